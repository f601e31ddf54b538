"""Products of rows that stay floats by codes: bit for bit what their definition says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infc.codegen.cpp.buffers import has_kernels
from infc.ir.formats import CHUNK
from infc.ir.schemes import SCHEMES

from .harness import DTYPES, RUNNABLE, TARGETS, Array, Kernels, kernels, same_bits
from .test_scaled_embedding import decoded, look_up
from .test_scaled_experts import HIDDEN, Experts
from .test_scaled_linear import SHAPES, Matrix, entry

WRAPPER = Path(__file__).parent / "wrapper_decoded.cpp"
PLAIN_ROWS = [
    name for name, one in SCHEMES.items() if one.activations is None and has_kernels(one.weight)
]
"""Schemes whose rows stay as they are."""


def build(target: str, dtype: str) -> Kernels:
    return kernels(target, dtype, WRAPPER)


@pytest.fixture(
    scope="session", params=[(t, d) for t in TARGETS for d in DTYPES], ids=lambda p: "-".join(p)
)
def kd(request: pytest.FixtureRequest) -> Kernels:
    return build(*request.param)


def drawn_rows(k: Kernels, rng: np.random.Generator, m: int, depth: int) -> Array:
    """Rows of the kernels' elements of very different sizes."""
    return k.array(rng.standard_normal((m, depth)) * rng.uniform(1e-3, 1e3, (m, 1)))


def run(k: Kernels, x: Array, w: Matrix, bias: Array | None, threads: int) -> Array:
    """The product by the kernel; what lies beside the rows is poison."""
    (m, depth), n = x.shape, w.codes.shape[0]
    given_rows, y = k.poison(m, depth + 5), k.poison(m, n + 3)
    given_rows[:, :depth] = x
    with k.team(threads, k.call("linear_scratch", depth)) as team:
        k.call(
            f"decoded_linear_{entry(w.scheme)}",
            *(team, given_rows, depth + 5, w.packed(k), w.scales, bias, y, n + 3, m, n, depth),
        )
    assert np.isnan(k.values(y[:, n:])).all(), "wrote past the row"
    return np.ascontiguousarray(y[:, :n])


def product(k: Kernels, x: Array, w: Matrix, bias: Array | None) -> Array:
    """The definition of linear_decoded_tile.hpp in numpy, each operation rounded to float32."""
    parts = {name: part.astype(np.float32) for name, part in w.levels().items()}
    groups = parts["codes"].shape[1]
    rows: Array = np.zeros((len(x), groups * CHUNK), np.float32)
    rows[:, : w.depth] = k.values(x)
    total: Array = np.zeros((len(x), len(w.codes)), np.float32)
    for g in range(groups):
        part = np.zeros_like(total)
        group = rows[:, g * CHUNK : (g + 1) * CHUNK]
        for i in range(CHUNK):
            part = part + group[:, i, None] * parts["codes"][:, g, i]
        total = total + part * parts["scale"][:, g].T
        if "minimum" in parts:
            lanes = group[:, :16] + group[:, 16:]
            for half in (8, 4, 2, 1):
                lanes = lanes[:, :half] + lanes[:, half : 2 * half]
            total = total + parts["minimum"][:, g].T * lanes
    y: Array = total * w.scales
    return k.array(y if bias is None else y + k.values(bias).astype(np.float32))


@pytest.mark.parametrize("scheme", PLAIN_ROWS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_are_bit_for_bit(kd: Kernels, scheme: str, with_bias: bool) -> None:
    rng = np.random.default_rng(2)
    for m, n, depth in SHAPES:
        x, w = drawn_rows(kd, rng, m, depth), Matrix.draw(rng, scheme, n, depth)
        bias = kd.array(rng.standard_normal(n)) if with_bias else None
        assert same_bits(run(kd, x, w, bias, 2), product(kd, x, w, bias)), (m, n, depth)


@settings(max_examples=40)
@given(
    st.sampled_from(RUNNABLE),
    st.sampled_from(DTYPES),
    st.sampled_from(PLAIN_ROWS),
    st.tuples(st.integers(1, 40), st.integers(1, 600), st.integers(1, 300)),
    st.integers(1, 4),
    st.integers(0, 2**32),
)
def test_any_product_is_bit_for_bit_and_a_row_alone_too(
    target: str, dtype: str, scheme: str, shape: tuple[int, int, int], threads: int, seed: int
) -> None:
    k = build(target, dtype)
    rng = np.random.default_rng(seed)
    m, n, depth = shape
    x, w = drawn_rows(k, rng, m, depth), Matrix.draw(rng, scheme, n, depth)
    y = run(k, x, w, None, threads)
    assert same_bits(y, product(k, x, w, None))
    row = slice(seed % m, seed % m + 1)
    assert same_bits(run(k, x[row].copy(), w, None, 1)[0], y[seed % m])


@pytest.mark.parametrize("scheme", PLAIN_ROWS)
def test_more_rows_than_a_block_has_are_products_too(kd: Kernels, scheme: str) -> None:
    rng = np.random.default_rng(8)
    x, w = drawn_rows(kd, rng, 301, 1100), Matrix.draw(rng, scheme, 130, 1100)
    exact = product(kd, x, w, None)
    for m in (301, 25, 7, 5, 3):
        assert same_bits(run(kd, x[:m].copy(), w, None, 2), exact[:m])


def test_a_row_that_is_no_number_spoils_no_other(kd: Kernels) -> None:
    rng = np.random.default_rng(4)
    x, w = drawn_rows(kd, rng, 9, 70), Matrix.draw(rng, "q4_1-weights", 20, 70)
    alone = run(kd, x, w, None, 1)
    x[4, 33] = kd.array(np.array([np.nan]))[0]
    y = run(kd, x, w, None, 1)
    assert np.isnan(kd.values(y[4])).all()
    others = [row for row in range(9) if row != 4]
    assert same_bits(y[others], alone[others])


@settings(max_examples=16)
@given(
    st.sampled_from(RUNNABLE),
    st.sampled_from(DTYPES),
    st.sampled_from(["int8-weights", "q4_1-weights"]),
    st.tuples(st.integers(1, 70), st.integers(1, 5), st.integers(1, 3)),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_experts_match_their_meaning_and_rows_stand_alone(
    target: str, dtype: str, scheme: str, sizes: tuple[int, int, int], biased: bool, seed: int
) -> None:
    k = build(target, dtype)
    tokens, count, slots = sizes
    slots = min(slots, count)
    rng = np.random.default_rng(seed)
    experts = Experts.draw(k, rng, scheme, count, biased)
    x, weight = (k.array(rng.standard_normal((tokens, n))) for n in (HIDDEN, slots))
    index = np.stack([rng.permutation(count)[:slots] for _ in range(tokens)]).astype(np.int64)
    y = experts.run(k, x, index, weight, 2)
    exact = experts.exact(k, x, index, weight)
    bound = np.abs(exact).max() * (1e-5 if dtype == "float" else 2e-2)
    assert np.abs(k.values(y) - exact).max() <= bound
    assert same_bits(experts.run(k, x, index, weight, 3), y)
    row = int(rng.integers(tokens))
    one = slice(row, row + 1)
    alone = experts.run(k, x[one].copy(), index[one].copy(), weight[one].copy(), 1)
    assert same_bits(alone[0], y[row])


@pytest.mark.parametrize("target", RUNNABLE)
def test_rows_of_a_table_are_those_of_the_format(target: str) -> None:
    k = build(target, "float")
    table = Matrix.draw(np.random.default_rng(3), "int4-weights", 130, 70)
    ids = np.random.default_rng(4).permutation(130).astype(np.int32)
    assert same_bits(look_up(k, table, ids, 2), k.array(decoded(table, ids)))
