"""Rows quantised to 8 bits and products of codes: bit for bit what their definitions say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infc.codegen.cpp.layout import PanelLayout, panel_layout
from infc.ir.types import DType

from .harness import DTYPES, TARGETS, Array, Kernels, kernels, same_bits

WRAPPER = Path(__file__).parent / "wrapper_i8.cpp"
LEVELS = (*TARGETS, "x86-64-v4")
"""AVX-512 has two ways: with VNNI and without."""
SHAPES = [(1, 1, 1), (1, 64, 32), (2, 65, 3), (6, 130, 33), (13, 16, 257), (40, 200, 514)]


def build(target: str, dtype: str) -> Kernels:
    return kernels(target, dtype, WRAPPER)


def layout(k: Kernels) -> PanelLayout:
    return panel_layout(DType.I8, k.target)


@pytest.fixture(params=[(t, d) for t in LEVELS for d in DTYPES], ids=lambda p: "-".join(p))
def k8(request: pytest.FixtureRequest) -> Kernels:
    return build(*request.param)


def quantized(x: Array) -> tuple[Array, Array]:
    """Codes and scales of rows x [M, K], in float32 as the op defines them."""
    wide = x.astype(np.float32)
    top = np.abs(wide).max(-1)
    used = top >= np.float32(1e-30)
    safe = np.where(used, top, np.float32(1))
    inverse = np.where(used, np.float32(127) / safe, np.float32(0))
    codes = np.clip(np.rint(wide * inverse[:, None]), -127, 127).astype(np.int8)
    return codes, np.where(used, safe / np.float32(127), np.float32(0))


def run_quantize(k: Kernels, x: Array, columns: int, threads: int = 2) -> tuple[Array, Array]:
    """Codes and scales of the first `columns` elements of each row."""
    rows, stride = x.shape
    q = np.full((rows + 1, columns), 99, np.int8)
    scale = np.full(rows + 1, np.nan, np.float32)
    with k.team(threads) as team:
        k.call("quantize", team, x, stride, q, scale, rows, columns)
    assert (q[rows] == 99).all() and np.isnan(scale[rows]), "wrote past the last row"
    return q[:rows], scale[:rows]


def run_linear(
    k: Kernels, q: Array, scales: tuple[Array, Array], w: Array, bias: Array | None, threads: int
) -> tuple[Array, Array]:
    """The product in the kernels' element type and in float; what lies beside q is poison."""
    (m, depth), n = q.shape, w.shape[0]
    packed = layout(k).pack(torch.from_numpy(w)).numpy()
    x = np.full((m, depth + 5), 77, np.int8)
    x[:, :depth] = q
    ys = k.poison(m, n + 3), np.full((m, n + 3), np.nan, np.float32)
    with k.team(threads) as team:
        for name, y in zip(("scaled_linear_rows", "scaled_linear_float"), ys, strict=True):
            k.call(
                name,
                team,
                *(x, depth + 5, scales[0], packed, scales[1], bias, y, n + 3, m, n, depth),
            )
    for y in ys:
        assert np.isnan(k.values(y[:, n:])).all(), "wrote past the row"
    return np.ascontiguousarray(ys[0][:, :n]), np.ascontiguousarray(ys[1][:, :n])


def product(
    k: Kernels, q: Array, scales: tuple[Array, Array], w: Array, bias: Array | None
) -> Array:
    """The definition in numpy, in float32."""
    sums = (q.astype(np.int64) @ w.astype(np.int64).T).astype(np.float32)
    y: Array = sums * (scales[0][:, None] * scales[1])
    return y if bias is None else y + k.values(bias).astype(np.float32)


def codes(rng: np.random.Generator, *shape: int) -> Array:
    return rng.integers(-127, 128, shape).astype(np.int8)


def scales(rng: np.random.Generator, n: int) -> Array:
    result: Array = rng.uniform(1e-4, 0.1, n).astype(np.float32)
    return result


def test_header_and_python_agree_on_the_layout(k8: Kernels) -> None:
    out = np.zeros(3, np.int64)
    k8.call("layout", out)
    assert (layout(k8).nr, layout(k8).kp, int(layout(k8).flipped)) == tuple(out.tolist())


@pytest.mark.parametrize("target", LEVELS)
def test_pack_and_unpack_are_inverse(target: str) -> None:
    packing = layout(build(target, "float"))
    weight = torch.from_numpy(codes(np.random.default_rng(0), 3, 67, 35))
    packed = packing.pack(weight)
    assert tuple(packed.shape) == packing.packed_shape((3, 67, 35)) and packed.dtype == torch.int8
    assert torch.equal(packing.unpack(packed, 67, 35), weight)


def test_rows_are_quantised_bit_for_bit(k8: Kernels) -> None:
    rng = np.random.default_rng(1)
    for rows, columns in ((1, 1), (3, 16), (5, 37), (2, 300)):
        x = k8.array(rng.standard_normal((rows, columns + 2)) * rng.uniform(0, 1e4, (rows, 1)))
        x[:, columns:] = k8.array(np.array([[np.nan]]))
        exact = quantized(k8.values(x)[:, :columns])
        for threads in (1, 3):
            q, scale = run_quantize(k8, x, columns, threads)
            assert same_bits(q, exact[0]) and same_bits(scale, exact[1])


def test_extreme_rows_are_quantised_bit_for_bit(k8: Kernels) -> None:
    x = np.zeros((6, 20), np.float32)
    x[1, 3], x[2, 19], x[3, :2] = -1e-31, 2e-30, (3e38, -3e38)
    x[4] = np.arange(20) - 9.5  # halves, of which some are ties at this scale
    x[4, 0] = 127
    x[5] = -0.0
    elements = k8.array(x)
    exact = quantized(k8.values(elements))
    q, scale = run_quantize(k8, elements, 20)
    assert same_bits(q, exact[0]) and same_bits(scale, exact[1])
    assert scale[1] == 0 and not q[1].any() and abs(int(q[2, 19])) == 127
    assert q[4, 10:14].tolist() == [0, 2, 2, 4], "ties go to even"


def test_a_row_that_is_no_number_says_so_in_its_scale(k8: Kernels) -> None:
    x = np.ones((3, 40), np.float32)
    x[0, 7], x[1, 39] = np.nan, np.inf
    _, scale = run_quantize(k8, k8.array(x), 40)
    assert np.isnan(scale[0]) and np.isinf(scale[1]) and np.isfinite(scale[2])


@pytest.mark.parametrize("with_bias", [False, True])
def test_products_are_bit_for_bit(k8: Kernels, with_bias: bool) -> None:
    rng = np.random.default_rng(2)
    for m, n, depth in SHAPES:
        q, w = codes(rng, m, depth), codes(rng, n, depth)
        bias = k8.array(rng.standard_normal(n)) if with_bias else None
        both = scales(rng, m), scales(rng, n)
        exact = product(k8, q, both, w, bias)
        y, wide = run_linear(k8, q, both, w, bias, 2)
        assert same_bits(wide, exact), (m, n, depth)
        assert same_bits(y, k8.array(exact)), (m, n, depth)


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums_are_exact(k8: Kernels, sign: int) -> None:
    # The deepest product that the op allows: sums of up to 127 * 127 * 65536, just below 2^30.
    depth = 65536
    q = np.full((1, depth), 127, np.int8)
    w = np.full((3, depth), sign * 127, np.int8)
    w[1, ::2] = -sign * 127
    w[2, -1] = sign
    one = np.ones(1, np.float32), np.ones(3, np.float32)
    exact = product(k8, q, one, w, None)
    assert exact[0, 1] == 0 and abs(exact[0, 0]) == np.float32(127 * 127 * depth)
    assert same_bits(run_linear(k8, q, one, w, None, 1)[1], exact)


@settings(max_examples=20)
@given(
    st.sampled_from(LEVELS),
    st.sampled_from(DTYPES),
    st.integers(1, 40),
    st.integers(1, 150),
    st.integers(1, 300),
    st.integers(1, 4),
    st.integers(0, 2**32),
)
def test_any_product_is_bit_for_bit_and_a_row_alone_too(
    target: str, dtype: str, m: int, n: int, depth: int, threads: int, seed: int
) -> None:
    k = build(target, dtype)
    rng = np.random.default_rng(seed)
    q, w = codes(rng, m, depth), codes(rng, n, depth)
    both = scales(rng, m), scales(rng, n)
    y, wide = run_linear(k, q, both, w, None, threads)
    assert same_bits(wide, product(k, q, both, w, None))
    row = seed % m
    alone = (both[0][row : row + 1].copy(), both[1])
    assert same_bits(run_linear(k, q[row : row + 1].copy(), alone, w, None, 1)[0][0], y[row])
