"""linear, embeddings and the packed layout: values against float64, bits against themselves."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .harness import DTYPES, RUNNABLE, Array, Kernels, kernels, same_bits

SHAPES = [(1, 1, 1), (1, 64, 32), (3, 65, 7), (7, 130, 33), (13, 16, 257), (40, 200, 96)]


def run_linear(
    k: Kernels, x: Array, packed: Array, bias: Array | None, n: int, threads: int, wide: bool
) -> Array:
    m, depth = x.shape
    y = np.full((m, n + 3), np.nan, np.float32) if wide else k.poison(m, n + 3)
    name = "linear_float" if wide else "linear_same"
    with k.team(threads, k.call("linear_scratch", depth)) as team:
        k.call(name, team, x, depth, packed, bias, y, n + 3, m, n, depth)
    untouched = np.full_like(y[:, n:], np.nan) if wide else k.poison(m, 3)
    assert same_bits(np.ascontiguousarray(y[:, n:]), untouched), "wrote past the row"
    return np.ascontiguousarray(y[:, :n])


def test_header_and_python_agree_on_the_layout(k: Kernels) -> None:
    out = np.zeros(2, np.int64)
    k.call("layout", out)
    assert (k.layout().nr, k.layout().kp) == tuple(out.tolist())


def test_pack_and_unpack_are_inverse(k: Kernels) -> None:
    weight = torch.randn(3, 67, 35)
    packed = k.layout().pack(weight)
    assert tuple(packed.shape) == k.layout().packed_shape((3, 67, 35))
    assert torch.equal(k.layout().unpack(packed, 67, 35), weight)
    assert torch.count_nonzero(packed) == weight.numel(), "the padding is zero"


def test_linear_matches_float64(k: Kernels) -> None:
    rng = np.random.default_rng(0)
    for m, n, depth in SHAPES:
        x = k.array(rng.standard_normal((m, depth)))
        w = k.array(rng.standard_normal((n, depth)))
        bias = k.array(rng.standard_normal(n))
        exact = k.values(x) @ k.values(w).T
        size = np.abs(k.values(x)) @ np.abs(k.values(w)).T + np.abs(k.values(bias))
        for b, wide in ((None, False), (bias, False), (bias, True)):
            y = run_linear(k, x, k.pack(w), b, n, 2, wide)
            expected = exact if b is None else exact + k.values(bias)
            bound = (depth + 2) * 2.0**-24 * size + (0 if wide else k.eps) * np.abs(expected)
            assert (np.abs(k.values(y) - expected) <= bound).all(), (m, n, depth)


def test_rows_of_floats_are_rounded_to_the_type_of_the_weights(k: Kernels) -> None:
    rng = np.random.default_rng(5)
    for m, n, depth in SHAPES:
        x = np.full((m, depth + 2), np.nan, np.float32)
        x[:, :depth] = rng.standard_normal((m, depth))
        rows = np.ascontiguousarray(x[:, :depth])
        w = k.pack(k.array(rng.standard_normal((n, depth))))
        bias = k.array(rng.standard_normal(n))
        y = np.full((m, n + 3), np.nan, np.float32)
        with k.team(2, k.call("linear_scratch", depth)) as team:
            wide_bias = k.values(bias).astype(np.float32)
            sizes = (m, n, depth)
            k.call("linear_rounding", team, x, depth + 2, w, wide_bias, y, n + 3, *sizes)
        assert np.isnan(y[:, n:]).all(), "wrote past the row"
        expected = run_linear(k, k.array(rows), w, bias, n, 1, True)
        assert same_bits(np.ascontiguousarray(y[:, :n]), expected), (m, n, depth)


def test_sums_are_fused_and_subnormals_flushed(float_kernels: Kernels) -> None:
    """The rounding error of a product, which only a fused sum keeps; and a product of 1e-40."""
    k = float_kernels
    a = np.float32(1) + np.float32(2**-12)
    x, w = np.array([[1, a]]), np.array([[-(a * a), a]])
    left = run_linear(k, k.array(x), k.pack(k.array(w)), None, 1, 1, False)
    fused = k.target.has("fma") or k.target.has("neon")
    assert left[0, 0] == (2.0**-24 if fused else 0)
    small = k.array(np.array([[1e-20]]))
    assert run_linear(k, small, k.pack(small), None, 1, 1, False)[0, 0] == 0


@settings(max_examples=10)
@given(
    st.sampled_from(RUNNABLE),
    st.sampled_from(DTYPES),
    st.integers(1, 30),
    st.integers(1, 150),
    st.integers(1, 70),
    st.integers(0, 2**32),
)
def test_a_row_alone_has_the_bits_it_has_in_a_batch(
    target: str, dtype: str, m: int, n: int, depth: int, seed: int
) -> None:
    k = kernels(target, dtype)
    rng = np.random.default_rng(seed)
    x = k.array(rng.standard_normal((m, depth)))
    packed = k.pack(k.array(rng.standard_normal((n, depth))))
    whole = run_linear(k, x, packed, None, n, 1, False)
    for threads in (2, 3):
        assert same_bits(run_linear(k, x, packed, None, n, threads, False), whole)
    for row in {0, m // 2, m - 1}:
        alone = run_linear(k, x[row : row + 1].copy(), packed, None, n, 2, False)
        assert same_bits(alone[0], whole[row])


def test_the_sum_is_taken_in_ascending_k(k: Kernels) -> None:
    # 2^30 swallows the ones around it, so that only those after its removal are left: one.
    # In descending order 20 would be left, in 16 lanes others.
    depth = 40
    x = np.ones((1, depth))
    x[0, 20], x[0, 38] = 2.0**30, -(2.0**30)
    y = run_linear(k, k.array(x), k.pack(k.array(np.ones((1, depth)))), None, 1, 1, False)
    # Where a pair of k is one instruction, the last two are taken together.
    assert k.values(y)[0, 0] in ((1.0,) if k.layout().kp == 1 else (0.0, 1.0))


def test_embedding_gathers_the_same_rows_from_both_layouts(k: Kernels) -> None:
    rng = np.random.default_rng(1)
    table = k.array(rng.standard_normal((150, 37)))
    ids = rng.integers(0, 150, 9)
    plain, packed = k.poison(9, 37), k.poison(9, 37)
    with k.team(2) as team:
        k.call("embed_plain", team, table, ids.astype(np.int64), plain, 9, 37)
        k.call("embed_packed", team, k.pack(table), ids.astype(np.int32), packed, 9, 37)
    assert same_bits(plain, table[ids])
    assert same_bits(packed, table[ids])


def test_take_rows(k: Kernels) -> None:
    x = k.array(np.random.default_rng(2).standard_normal((6, 11)))
    index = np.array([5, 0, 0, 3], np.int32)
    y = k.poison(4, 12)
    with k.team(3) as team:
        k.call("take", team, x, 11, index, y, 12, 4, 11)
    assert same_bits(np.ascontiguousarray(y[:, :11]), x[index])
