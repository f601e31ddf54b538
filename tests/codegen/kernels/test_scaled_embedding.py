"""Rows read out of packed panels of codes: bit for bit what their format says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infc.ir.ops.gather import scaled_embedding_meaning

from .harness import DTYPES, RUNNABLE, Array, Kernels, same_bits
from .test_scaled_linear import QUANTIZING, Matrix, build, entry


def look_up(k: Kernels, table: Matrix, ids: Array, threads: int) -> Array:
    """Rows of the packed table, in the kernels' element type; what follows them stays poison."""
    y = k.poison(len(ids) + 1, table.depth)
    with k.team(threads) as team:
        k.call(
            f"scaled_embedding_{entry(table.scheme)}",
            *(team, table.packed(k), table.scales, ids, y, len(ids), table.depth),
        )
    assert np.isnan(k.values(y[-1])).all(), "wrote past the last row"
    return np.ascontiguousarray(y[:-1])


def decoded(table: Matrix, ids: Array) -> Array:
    """The definition in numpy, each operation rounded to float32."""
    parts = {name: part[ids].astype(np.float32) for name, part in table.levels().items()}
    values = parts["codes"]
    if "scale" in parts:
        values = parts["scale"] * values
    if "minimum" in parts:
        values = values + parts["minimum"]
    rows = values.reshape(len(ids), -1)[:, : table.depth]
    result: Array = rows * table.scales[ids][:, None]
    return result


@pytest.fixture(params=QUANTIZING)
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize(("target", "dtype"), [(t, d) for t in RUNNABLE for d in DTYPES])
def test_rows_have_the_bits_that_their_format_says(target: str, dtype: str, scheme: str) -> None:
    k = build(target, dtype)
    rng = np.random.default_rng(3)
    # Vocabularies that end within a panel, and rows that end within a group.
    for vocab, depth in ((1, 1), (65, 32), (130, 37), (67, 300), (64, 256), (200, 515)):
        table = Matrix.draw(rng, scheme, vocab, depth)
        ids = np.concatenate([rng.permutation(vocab), [vocab - 1, 0]]).astype(np.int32)
        assert same_bits(look_up(k, table, ids, 2), k.array(decoded(table, ids))), (vocab, depth)


@settings(max_examples=40)
@given(
    st.sampled_from(RUNNABLE),
    st.sampled_from(QUANTIZING),
    st.tuples(st.integers(1, 200), st.integers(1, 600)),
    st.lists(st.integers(0, 2**31), min_size=1, max_size=20),
    st.integers(1, 4),
    st.integers(0, 2**32),
)
def test_any_row_is_that_of_the_op_alone_and_among_others(
    target: str, scheme: str, shape: tuple[int, int], rows: list[int], threads: int, seed: int
) -> None:
    k = build(target, "float")
    table = Matrix.draw(np.random.default_rng(seed), scheme, *shape)
    ids = np.array([row % shape[0] for row in rows], np.int32)
    meant = scaled_embedding_meaning(
        *(torch.from_numpy(one) for one in (table.codes, table.scales, ids)),
        dtype="f32",
        scheme=scheme,
        width=table.depth,
    )
    found = look_up(k, table, ids, threads)
    assert same_bits(found, meant.numpy())
    assert same_bits(look_up(k, table, ids[-1:].copy(), 1)[0], found[-1])
