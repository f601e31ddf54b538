"""Rows quantised to 8 bits and products of codes: bit for bit what their definitions say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infc.codegen.cpp.buffers import has_kernels
from infc.codegen.cpp.layout import BlockLayout, Layout, PanelLayout, weight_layout
from infc.ir.formats import CHUNK, Part
from infc.ir.schemes import MAX_EXACT_DEPTH, SCHEMES
from infc.ir.types import DType

from .harness import DTYPES, RUNNABLE, TARGETS, Array, Kernels, kernels, same_bits

WRAPPER = Path(__file__).parent / "wrapper_codes.cpp"
SHAPES = [(1, 1, 1), (1, 700, 32), (2, 65, 3), (6, 130, 33), (13, 16, 257), (40, 200, 514)]


def build(target: str, dtype: str) -> Kernels:
    return kernels(target, dtype, WRAPPER)


def layout(k: Kernels, scheme: str) -> Layout:
    return weight_layout(SCHEMES[scheme].weight, k.target)


QUANTIZING = [
    name for name, one in SCHEMES.items() if one.activations is not None and has_kernels(one.weight)
]
"""Schemes that quantize rows."""
GROUPED = [name for name in QUANTIZING if not SCHEMES[name].is_exact]


@pytest.fixture(params=QUANTIZING)
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(
    scope="session", params=[(t, d) for t in TARGETS for d in DTYPES], ids=lambda p: "-".join(p)
)
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


def run_quantize(
    k: Kernels, x: Array, columns: int, threads: int = 2, group: int = 0
) -> tuple[Array, Array]:
    """Codes and scales of the first `columns` elements of each row."""
    rows, stride = x.shape
    q = np.full((rows + 1, columns), 99, np.int8)
    count = -(-columns // group) if group else 1
    scale = np.full((rows + 1, count), np.nan, np.float32)
    with k.team(threads) as team:
        name = "quantize_groups" if group else "quantize"
        k.call(name, team, x, stride, q, scale, rows, columns)
    assert (q[rows] == 99).all() and np.isnan(scale[rows]).all(), "wrote past the last row"
    return q[:rows], scale[:rows] if group else scale[:rows, 0]


@dataclass(frozen=True, slots=True)
class Matrix:
    """Codes of a matrix `[.., N, K]` under a scheme, with their scales."""

    scheme: str
    codes: Array
    scales: Array
    depth: int

    @classmethod
    def draw(cls, rng: np.random.Generator, scheme: str, *shape: int) -> Matrix:
        """Any codes that a scheme has, not only those that rounding gives."""
        form = SCHEMES[scheme].weight
        *lead, depth = shape
        drawn = rng.integers(-127, 128, shape).astype(np.int8)
        if form.group > 1:
            blocks = rng.integers(0, 256, (*lead, -(-depth // form.group), form.block_bytes))
            drawn = blocks.astype(np.uint8)
            for part in form.parts[:-1]:
                cls._draw_scales(rng, drawn, part, form.name)
            if form.bits == 8:
                codes = drawn[..., form.part("codes").offset :]
                codes[codes == 128] = 127  # -128 is no code
            drawn = drawn.reshape(*lead, -1)
        return cls(scheme, drawn, scales(rng, int(np.prod(lead))).reshape(lead), depth)

    @staticmethod
    def _draw_scales(rng: np.random.Generator, blocks: Array, part: Part, name: str) -> None:
        most = 15 if name == "i4_g32" else 127  # beyond which exact products would not be
        where = blocks[..., part.offset : part.offset + part.num_bytes]
        if part.dtype is DType.I8:
            where[...] = rng.integers(-most, most + 1, where.shape).astype(np.int8).view(np.uint8)
        else:
            drawn = rng.normal(0, 0.01, where.shape[:-1]).astype(np.float16)
            drawn[rng.random(drawn.shape) < 0.1] = np.float16(6e-8)  # subnormal
            where[...] = drawn[..., None].view(np.uint8)

    def levels(self) -> dict[str, Array]:
        """The parts of blocks, `[.., N, chunks, ..]`: levels, and what each 32 are scaled by."""
        form = SCHEMES[self.scheme].weight
        parts = form.split(torch.from_numpy(self.codes))
        levels = form.code_levels(parts.pop("codes"))
        chunks = levels.flatten(-2).unflatten(-1, (-1, min(CHUNK, form.group)))
        found = {
            name: part.repeat_interleave(form.group // CHUNK, -2) for name, part in parts.items()
        }
        return {name: part.numpy() for name, part in found.items()} | {"codes": chunks.numpy()}

    def integers(self) -> Array:
        """What the codes of an exact scheme stand for, `[.., N, K]`."""
        parts = self.levels()
        plain = parts["codes"].astype(np.int64)
        if "scale" in parts:
            plain = plain * parts["scale"].astype(np.int64)
        return plain.reshape(*plain.shape[:-2], -1)[..., : self.depth]

    def packed(self, k: Kernels) -> Array:
        """In the panels of the target."""
        made: Array = layout(k, self.scheme).pack(torch.from_numpy(self.codes)).numpy()
        return made


def run_linear(
    k: Kernels, q: Array, row_scales: Array, w: Matrix, bias: Array | None, threads: int
) -> tuple[Array, Array]:
    """The product in the kernels' element type and in float; what lies beside q is poison."""
    (m, depth), n = q.shape, w.codes.shape[0]
    packed = w.packed(k)
    x = np.full((m, depth + 5), 77, np.int8)
    x[:, :depth] = q
    ys = k.poison(m, n + 3), np.full((m, n + 3), np.nan, np.float32)
    with k.team(threads, k.call("linear_scratch", depth)) as team:
        for kind, y in zip(("", "_float"), ys, strict=True):
            k.call(
                f"scaled_linear_{entry(w.scheme)}{kind}",
                team,
                *(x, depth + 5, row_scales, packed, w.scales, bias, y, n + 3, m, n, depth),
            )
    for y in ys:
        assert np.isnan(k.values(y[:, n:])).all(), "wrote past the row"
    return np.ascontiguousarray(ys[0][:, :n]), np.ascontiguousarray(ys[1][:, :n])


def product(k: Kernels, q: Array, row_scales: Array, w: Matrix, bias: Array | None) -> Array:
    """The definition in numpy, in float32.

    Sums of codes are below 2^53: in float64, for which numpy has fast products, they are exact.
    """
    y: Array
    if not SCHEMES[w.scheme].is_exact:
        y = group_sums(q, row_scales, w) * w.scales
    else:
        sums = (q.astype(np.float64) @ w.integers().T.astype(np.float64)).astype(np.float32)
        y = sums * (row_scales[:, None] * w.scales)
    return y if bias is None else y + k.values(bias).astype(np.float32)


def group_sums(q: Array, row_scales: Array, w: Matrix) -> Array:
    """The sums over groups of linear_groups_tile.hpp, each operation rounded to float32."""
    parts = {name: part.astype(np.float32) for name, part in w.levels().items()}
    padded: Array = np.zeros((len(q), row_scales.shape[1] * CHUNK))
    padded[:, : w.depth] = q
    total: Array = np.zeros((len(q), len(w.codes)), np.float32)
    for g in range(row_scales.shape[1]):
        x = padded[:, g * CHUNK : (g + 1) * CHUNK]
        dot = (x @ parts["codes"][:, g].T.astype(np.float64)).astype(np.float32)
        scale = row_scales[:, g, None]
        total = total + dot * (scale * parts["scale"][:, g].T)
        if "minimum" in parts:
            sums = scale * x.sum(-1, keepdims=True).astype(np.float32)
            total = total + parts["minimum"][:, g].T * sums
    return total


def entry(scheme: str) -> str:
    """The part of an entry point's name that stands for the scheme."""
    return scheme.replace("-", "_")


def drawn_rows(rng: np.random.Generator, scheme: str, m: int, depth: int) -> Array:
    """Scales of rows as the scheme has them."""
    activations = SCHEMES[scheme].activations
    assert activations is not None
    group = activations.group
    count = m * -(-depth // group) if group else m
    return scales(rng, count).reshape(m, -1) if group else scales(rng, m)


def codes(rng: np.random.Generator, *shape: int) -> Array:
    return rng.integers(-127, 128, shape).astype(np.int8)


def scales(rng: np.random.Generator, n: int) -> Array:
    result: Array = rng.uniform(1e-4, 0.1, n).astype(np.float32)
    return result


def test_header_and_python_agree_on_the_layout(k8: Kernels) -> None:
    out = np.zeros(4, np.int64)
    k8.call("layout", out)
    panels = layout(k8, "int8-token")
    assert isinstance(panels, PanelLayout)
    sizes = (panels.nr, panels.kp, int(panels.flipped), layout(k8, "int4-token").nr)
    assert sizes == tuple(out.tolist())


@pytest.mark.parametrize("target", TARGETS)
def test_pack_and_unpack_are_inverse(target: str) -> None:
    packing = layout(build(target, "float"), "int8-token")
    assert isinstance(packing, PanelLayout)
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


def test_groups_are_quantised_bit_for_bit(k8: Kernels) -> None:
    rng = np.random.default_rng(11)
    for rows, columns in ((1, 1), (3, 32), (5, 37), (2, 300)):
        x = k8.array(rng.standard_normal((rows, columns + 2)) * rng.uniform(0, 1e4, (rows, 1)))
        x[:, columns:] = k8.array(np.array([[np.nan]]))
        x[0, : min(columns, 32)] = 0
        groups = -(-columns // CHUNK)
        padded = np.zeros((rows, groups * CHUNK))
        padded[:, :columns] = k8.values(x)[:, :columns]
        exact = quantized(padded.reshape(-1, CHUNK))
        for threads in (1, 3):
            q, scale = run_quantize(k8, x, columns, threads, CHUNK)
            assert same_bits(q, np.ascontiguousarray(exact[0].reshape(rows, -1)[:, :columns]))
            assert same_bits(scale, exact[1].reshape(rows, groups))


@pytest.mark.parametrize("name", ["int4-token", *GROUPED])
def test_group_panels_and_their_inverse(k8: Kernels, name: str) -> None:
    w = Matrix.draw(np.random.default_rng(7), name, 3, 67, 70)
    packing = layout(k8, name)
    assert isinstance(packing, BlockLayout)
    packed = w.packed(k8)
    assert packed.shape == packing.packed_shape(w.codes.shape)
    assert same_bits(packing.unpack_array(packed, 67), w.codes)
    size = SCHEMES[name].weight.parts[0].num_bytes
    padding = packed[:, -1, :, 67 % packing.nr * size : packing.nr * size]
    assert not padding.any(), "what pads multiplies by 0"


@pytest.mark.parametrize("with_bias", [False, True])
def test_products_are_bit_for_bit(k8: Kernels, scheme: str, with_bias: bool) -> None:
    rng = np.random.default_rng(2)
    for m, n, depth in SHAPES:
        q, w = codes(rng, m, depth), Matrix.draw(rng, scheme, n, depth)
        bias = k8.array(rng.standard_normal(n)) if with_bias else None
        rows = drawn_rows(rng, scheme, m, depth)
        exact = product(k8, q, rows, w, bias)
        y, wide = run_linear(k8, q, rows, w, bias, 2)
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
    one, matrix = np.ones(1, np.float32), Matrix("int8-token", w, np.ones(3, np.float32), depth)
    exact = product(k8, q, one, matrix, None)
    assert exact[0, 1] == 0 and abs(exact[0, 0]) == np.float32(127 * 127 * depth)
    assert same_bits(run_linear(k8, q, one, matrix, None, 1)[1], exact)


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums_of_groups_are_exact(k8: Kernels, sign: int) -> None:
    # Every product of a group at its limit: codes -8 and 7, multipliers 15 and -15.
    depth = 65536
    q = np.full((1, depth), sign * 127, np.int8)
    w = np.zeros((4, depth // 32, 17), np.uint8)
    w[1, :, 1:], w[3, :, 1:] = 0xFF, 0xFF
    w[..., 0] = np.array([15, 15, -15, -15], np.int8).view(np.uint8)[:, None]
    one, matrix = (
        np.ones(1, np.float32),
        Matrix("int4-token", w.reshape(4, -1), np.ones(4, np.float32), depth),
    )
    exact = product(k8, q, one, matrix, None)
    assert exact[0].tolist() == [sign * 127 * depth * x for x in (-120, 105, 120, -105)]
    assert same_bits(run_linear(k8, q, one, matrix, None, 1)[1], exact)


@pytest.mark.parametrize("name", GROUPED)
def test_rows_of_groups_may_be_longer_than_one_sum(k8: Kernels, name: str) -> None:
    rng = np.random.default_rng(3)
    depth = MAX_EXACT_DEPTH + 8
    w = Matrix.draw(rng, name, 3, depth)
    for m in (1, 9):  # streamed panels, and tiles of rows
        q, rows = codes(rng, m, depth), drawn_rows(rng, name, m, depth)
        exact = product(k8, q, rows, w, None)
        assert same_bits(run_linear(k8, q, rows, w, None, 2)[1], exact)


@settings(max_examples=40)
@given(
    st.sampled_from(RUNNABLE),
    st.sampled_from(DTYPES),
    st.sampled_from(QUANTIZING),
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
    q, w, rows = (
        codes(rng, m, depth),
        Matrix.draw(rng, scheme, n, depth),
        drawn_rows(rng, scheme, m, depth),
    )
    y, wide = run_linear(k, q, rows, w, None, threads)
    assert same_bits(wide, product(k, q, rows, w, None))
    row = slice(seed % m, seed % m + 1)
    alone, _ = run_linear(k, q[row].copy(), rows[row].copy(), w, None, 1)
    assert same_bits(alone[0], y[seed % m])


def test_more_rows_than_a_block_has_are_products_too(k8: Kernels, scheme: str) -> None:
    # Blocks of rows, tiles of equal height and the odd ones, each row as if it were alone.
    rng = np.random.default_rng(8)
    q, w = codes(rng, 301, 3000), Matrix.draw(rng, scheme, 130, 3000)
    rows = drawn_rows(rng, scheme, 301, 3000)
    exact = product(k8, q, rows, w, None)
    for m in (301, 25, 7, 5, 3):
        y, wide = run_linear(k8, q[:m].copy(), rows[:m].copy(), w, None, 2)
        assert same_bits(wide, exact[:m]) and same_bits(y, k8.array(exact[:m]))
