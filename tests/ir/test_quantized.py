"""What codes mean: rounding, exact sums, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from infc.ir.errors import ProgramError
from infc.ir.formats import I4_G32
from infc.ir.ops import get_op
from infc.ir.ops.quantized import quantize_rows_meaning
from infc.ir.paged_state import PagedState
from infc.ir.program import WeightExpr
from infc.ir.resources import KvGroup
from infc.ir.rounding import quantize_i4, quantize_i8
from infc.ir.row_codes import ROW_CODES, RowCodes
from infc.ir.schemes import INT4_TOKEN, INT8_TOKEN, MAX_EXACT_DEPTH, SCHEMES, Scheme
from infc.ir.types import DType, Sym, TensorType
from infc.ir.weights import checkpoint, evaluate_expr, infer_weight

T = Sym("T")
CODES = TensorType(DType.I8, (T, 8)), TensorType(DType.F32, (T,))
MATRIX = TensorType(DType.I8, (4, 8)), TensorType(DType.F32, (4,))


def random(seed: int, *shape: int, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape, generator=generator)
    return rows * torch.exp(spread * torch.randn(*shape[:-1], 1, generator=generator))


def integers_i4(codes: torch.Tensor) -> torch.Tensor:
    """Code times multiplier of bytes `[N, groups * 17]`, as int8 `[N, groups * 32]`."""
    parts = I4_G32.split(codes)
    return (I4_G32.code_levels(parts["codes"]) * parts["scale"]).flatten(-2)


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 70), st.sampled_from([0.0, 8.0]))
def test_codes_are_the_nearest_of_255(seed: int, rows: int, depth: int, spread: float) -> None:
    x = random(seed, rows, depth, spread=spread)
    codes, scale = quantize_i8(x)
    assert codes.dtype == torch.int8
    assert int(codes.abs().amax()) == 127  # the largest of a row is a whole scale of 127
    error = (codes.double() * scale[:, None].double() - x.double()).abs()
    assert bool((error <= scale[:, None].double() * 0.50001).all())
    assert torch.equal(quantize_i8(-x)[0], -codes)
    # Multiplied by a power of two, a row keeps its codes.
    assert torch.equal(quantize_i8(x * 4)[0], codes)


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 100), st.sampled_from([0.0, 8.0]))
@example(450, 5, 70, 0.0)  # the largest weight of a group, and one like it of the other sign
def test_codes_of_4_bits_are_near(seed: int, rows: int, depth: int, spread: float) -> None:
    w = random(seed, rows, depth, spread=spread)
    codes, scale = quantize_i4(w)
    groups = -(-depth // 32)
    assert codes.dtype == torch.uint8 and codes.shape == (rows, groups * 17)
    whole = integers_i4(codes)
    assert whole.dtype == torch.int8 and not whole[:, depth:].any(), "what pads a group is zero"
    top = w.abs().amax(-1)
    assert int(whole.abs().amax()) in (112, 120)  # of a row the largest: -8 times 15, or cut to 14
    torch.testing.assert_close(scale * 120, top)
    # The multiplier m is an eighth of the group's largest weight, but for 1.5; a weight as large,
    # of the other sign, gets no more than 7 m.
    parts = torch.nn.functional.pad(w, (0, groups * 32 - depth)).reshape(rows, groups, 32)
    step = parts.abs().amax(-1, keepdim=True) / 8 + scale[:, None, None] * 7 * 1.5
    error = (whole.reshape(parts.shape) * scale[:, None, None] - parts).abs()
    assert bool((error <= step).all())
    assert torch.equal(quantize_i4(w * 4)[0], codes)


def test_4_bits_lose_what_they_may() -> None:
    # 4.5-bit blocks of 32 with a float scale lose 0.086 of normally distributed weights.
    w = random(5, 300, 896, spread=0.0)
    codes, scale = quantize_i4(w)
    lost = (integers_i4(codes) * scale[:, None] - w).square().sum() / w.square().sum()
    assert 0.07 < float(lost.sqrt()) < 0.086
    assert 8 * codes[0].nbytes == 4.25 * 896


def test_rows_of_zeros_are_zeros_in_4_bits() -> None:
    w = torch.zeros(2, 40)
    w[1, 33] = 1.0  # beside a group of zeros
    codes, scale = quantize_i4(w)
    assert scale.tolist() == [0, pytest.approx(1 / 120)]
    assert integers_i4(codes)[1, :40].tolist() == [0] * 33 + [120] + [0] * 6
    assert quantize_i4(torch.full((1, 3), torch.nan))[1].isnan().all()


def test_rows_without_a_magnitude_are_zeros() -> None:
    codes, scale = quantize_i8(torch.tensor([[0.0, -0.0], [1e-31, -1e-38], [2e-30, 1e-30]]))
    assert codes.tolist() == [[0, 0], [0, 0], [127, 64]]
    assert scale[:2].tolist() == [0, 0]
    assert scale[2] > 0
    assert quantize_i8(torch.tensor([[1.0, torch.nan]]))[1].isnan().all()


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 9), st.integers(1, 40))
def test_products_sum_exactly(seed: int, rows: int, width: int, depth: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randint(-127, 128, (n, depth), generator=generator) for n in (rows, width))
    one, run = torch.ones(max(rows, width)), get_op("scaled_linear").meaning
    y = run(
        x.to(torch.int8),
        one[:rows],
        w.to(torch.int8),
        one[:width],
        dtype="f32",
        scheme="int8-token",
    )
    assert isinstance(y, torch.Tensor)
    assert torch.equal(y.long(), x @ w.T)


@pytest.mark.parametrize("depth", [1023, 1024, 1025, 5000])
@pytest.mark.parametrize("low", [-128, 1, 100])
def test_long_products_sum_exactly(depth: int, low: int) -> None:
    """Codes that are all large and of one sign make the largest sums that there are."""
    generator = torch.Generator().manual_seed(depth)
    x = torch.randint(low, 128, (3, depth), generator=generator)
    w = torch.randint(low, 128, (7, depth), generator=generator)
    one = torch.ones(7)
    run = get_op("scaled_linear").meaning
    y = run(x.to(torch.int8), one[:3], w.to(torch.int8), one, dtype="f64", scheme="int8-token")
    assert isinstance(y, torch.Tensor)
    exact = (x @ w.T).to(torch.float32)  # the scales are float32, and what they multiply becomes so
    assert torch.equal(y, exact.double())


def test_the_longest_row_of_largest_codes_is_exact() -> None:
    codes = torch.full((1, MAX_EXACT_DEPTH), 127, dtype=torch.int8)
    one = torch.ones(1)
    y = get_op("scaled_linear").meaning(codes, one, codes, one, dtype="f64", scheme="int8-token")
    assert isinstance(y, torch.Tensor)
    assert y.item() == 127 * 127 * MAX_EXACT_DEPTH < 2**31
    assert 255 * 127 * MAX_EXACT_DEPTH < 2**31


@pytest.mark.parametrize("scheme", list(SCHEMES.values()), ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_a_product_is_near_the_plain_one(dtype: str, scheme: Scheme) -> None:
    x, w = random(1, 5, 256, spread=0.0), random(2, 48, 256, spread=0.0)
    bias = random(3, 1, 48)[0]
    codes, scale = scheme.quantize(w)
    kind = getattr(torch, {"f32": "float32", "bf16": "bfloat16"}[dtype])
    attrs = {"dtype": dtype, "scheme": scheme.name}
    if scheme.activations is None:
        y = get_op("decoded_linear").meaning(x, codes, scale, bias.to(kind), **attrs)
    else:
        how = scheme.activations
        rows = quantize_rows_meaning(x, how.group, how.codes.name)
        y = get_op("scaled_linear").meaning(*rows, codes, scale, bias.to(kind), **attrs)
    assert isinstance(y, torch.Tensor)
    assert y.dtype == kind
    expected = x @ w.T + bias
    bound = 0.05 if scheme.is_fp8 else 0.02 if scheme.weight.bits == 8 else 0.12
    assert float((y - expected).abs().amax() / expected.abs().amax()) < bound


def test_types_are_inferred_and_refused() -> None:
    linear, attrs = get_op("scaled_linear"), {"dtype": "bf16", "scheme": "int8-token"}
    assert linear.infer([*CODES, *MATRIX], attrs) == (TensorType(DType.BF16, (T, 4)),)
    x = TensorType(DType.BF16, (T, 3, 8))
    assert get_op("quantize_rows").infer([x], {}) == (
        TensorType(DType.I8, (T, 3, 8)),
        TensorType(DType.F32, (T, 3)),
    )
    bf16 = TensorType(DType.BF16, (4, 8))
    deep = TensorType(DType.I8, (4, MAX_EXACT_DEPTH + 1))
    for match, types in {
        "expected element type i8": [*CODES, bf16, MATRIX[1]],
        "w_scale": [*CODES, MATRIX[0], TensorType(DType.F32, (8,))],
        "x_scale": [CODES[0], MATRIX[1], *MATRIX],
        "bias": [*CODES, *MATRIX, TensorType(DType.I32, (4,))],
        "int32 sums": [TensorType(DType.I8, (T, *deep.shape[1:])), CODES[1], deep, MATRIX[1]],
    }.items():
        with pytest.raises(ProgramError, match=match):
            linear.infer(types, attrs)
    with pytest.raises(ProgramError, match="no fixed length"):
        linear.infer([TensorType(DType.I8, (8, T)), TensorType(DType.F32, (8,)), *MATRIX], attrs)
    with pytest.raises(ProgramError, match="scheme"):
        linear.infer([*CODES, *MATRIX], attrs | {"scheme": "int3"})
    with pytest.raises(ProgramError, match="at least one"):
        get_op("quantize_rows").infer([TensorType(DType.F32, ())], {})


def test_each_op_takes_the_schemes_that_quantise_rows_as_it_does() -> None:
    x, w = TensorType(DType.BF16, (T, 8)), TensorType(DType.U8, (4, 33))
    decoded, attrs = get_op("decoded_linear"), {"dtype": "f32", "scheme": "int8-weights"}
    assert decoded.infer([x, w, MATRIX[1]], attrs) == (TensorType(DType.F32, (T, 4)),)
    with pytest.raises(ProgramError, match="int8 multiplies quantized rows: scaled_linear"):
        decoded.infer([x, w, MATRIX[1]], attrs | {"scheme": "int8"})
    with pytest.raises(ProgramError, match="int8-weights multiplies rows as they are"):
        get_op("scaled_linear").infer([*CODES, w, MATRIX[1]], attrs)
    wrong = {
        "at least one": [TensorType(DType.F32, ()), w, MATRIX[1]],
        "floating": [CODES[0], w, MATRIX[1]],
        "w_scale": [x, w, CODES[1]],
        "expected u8": [x, TensorType(DType.U8, (4, 34)), MATRIX[1]],
    }
    for match, types in wrong.items():
        with pytest.raises(ProgramError, match=match):
            decoded.infer(types, attrs)


def test_tokens_stay_apart() -> None:
    linear, rows = get_op("scaled_linear"), get_op("quantize_rows")
    outs = (TensorType(DType.F32, (T, 4)),)
    attrs = {"dtype": "f32", "scheme": "int8-token"}
    assert linear.mixes([*CODES, *MATRIX], outs, attrs, "T") is None
    assert rows.mixes([TensorType(DType.F32, (8, T))], outs, {}, "T") == "sums over tokens"


def test_weights_become_codes_and_scales() -> None:
    kind = TensorType(DType.BF16, (2, 3, 8))
    w = random(4, 2, 3, 8).bfloat16()
    leaf = checkpoint("w", kind)
    made = {op: WeightExpr(op, (leaf,), {"scheme": "int8-token"}) for op in ("codes", "scales")}
    assert (
        infer_weight(made["codes"])
        == INT8_TOKEN.weight.code_type(kind)
        == TensorType(DType.I8, (2, 3, 8))
    )
    assert (
        infer_weight(made["scales"])
        == INT8_TOKEN.weight.scale_type(kind)
        == TensorType(DType.F32, (2, 3))
    )
    codes, scales = (evaluate_expr(expr, {"checkpoint": lambda _: w}) for expr in made.values())
    assert torch.equal(codes, quantize_i8(w)[0])
    assert torch.equal(scales, quantize_i8(w)[1])


def test_codes_of_4_bits_are_weights_of_their_own_width() -> None:
    kind = TensorType(DType.BF16, (2, 3, 40))
    w = random(4, 2, 3, 40).bfloat16()
    leaf = checkpoint("w", kind)
    expr = WeightExpr("codes", (leaf,), {"scheme": "int4-token"})
    assert (
        infer_weight(expr) == INT4_TOKEN.weight.code_type(kind) == TensorType(DType.U8, (2, 3, 34))
    )
    assert torch.equal(evaluate_expr(expr, {"checkpoint": lambda _: w}), quantize_i4(w)[0])
    linear, attrs = get_op("scaled_linear"), {"dtype": "f32", "scheme": "int4-token"}
    x, scales = TensorType(DType.I8, (T, 40)), TensorType(DType.F32, (3,))
    given_types = [x, CODES[1], TensorType(DType.U8, (3, 34)), scales]
    assert linear.infer(given_types, attrs) == (TensorType(DType.F32, (T, 3)),)
    with pytest.raises(ProgramError, match=r"expected u8\[3, 34\] for 40 columns"):
        linear.infer([*given_types[:2], TensorType(DType.U8, (3, 51)), scales], attrs)


@pytest.mark.parametrize("kind", ROW_CODES.values(), ids=lambda kind: kind.name)
def test_a_cache_of_codes_gives_back_what_they_say(kind: RowCodes) -> None:
    group = KvGroup("kv", (3,), 2, 4, 6, kind.name, 16)
    assert group.bytes_per_block() == 16 * 2 * (4 + 6 + 2 * 4)
    state = PagedState.allocate([group], 3)
    tables = {"kv": torch.tensor([[2, 1]])}
    state.set_step(torch.arange(20), torch.tensor([0, 20]), torch.tensor([20]), tables)
    k, v = random(5, 20, 2, 4).bfloat16(), random(6, 20, 2, 6).bfloat16()
    state.write("kv", 3, k, v)
    for stored, given_rows in zip(state.read("kv", 3, 0, 5), (k, v), strict=True):
        codes, scale = kind.rows(given_rows[5:])
        assert torch.equal(stored, kind.decode(codes, scale, 0, torch.float32))
        error = (stored - given_rows[5:].float()).abs() / given_rows[5:].float().abs().amax()
        assert error.max() < 2**-4
    state.copy_block(3, 2, 0)
    for stores in (state.keys, state.values, state.key_scales, state.value_scales):
        assert torch.equal(stores[3][0], stores[3][2])
        assert bool((stores[3][0] != 0).any())


@pytest.mark.parametrize("scheme", list(SCHEMES.values()), ids=lambda s: s.name)
def test_experts_of_codes_are_near_the_plain_ones(scheme: Scheme) -> None:
    x, gate_up, down = (random(i, *shape, spread=0.0) for i, shape in enumerate(_EXPERTS))
    index = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [2, 0]])
    weight = random(9, 5, 2).abs()
    biases = random(7, 3, 48, spread=0.0), random(8, 3, 32, spread=0.0)
    gate = {"act": "silu", "alpha": 1.7, "limit": 7.0, "shift": 1.0}
    plain = get_op("moe").meaning(x, index, weight, gate_up, down, *biases, **gate)
    operands = (*scheme.quantize(gate_up), *scheme.quantize(down))
    run = get_op("scaled_moe").meaning
    y = run(x, index, weight, *operands, *biases, scheme=scheme.name, **gate)
    assert isinstance(plain, torch.Tensor)
    assert isinstance(y, torch.Tensor)
    error = float((y - plain).abs().amax() / plain.abs().amax())
    assert 1e-4 < error < (0.1 if scheme.is_fp8 else 0.03 if scheme.weight.bits == 8 else 0.35)
    # A row's result comes from its own codes and scales alone.
    alone = run(x[3:4], index[3:4], weight[3:4], *operands, *biases, scheme=scheme.name, **gate)
    assert isinstance(alone, torch.Tensor)
    torch.testing.assert_close(alone[0], y[3], rtol=1e-5, atol=1e-5)


_EXPERTS = ((5, 32), (3, 48, 32), (3, 32, 24))


def test_rows_are_divided_once() -> None:
    # 127 / x and 127 * (1 / x) differ in a quarter of all numbers, and codes where that is a tie.
    x = random(3, 4000, 2, spread=1.0)
    x[:, 1] = x[:, 0] / 2
    top = x.abs().amax(-1, keepdim=True).numpy()
    expected = np.rint(x.numpy() * (np.float32(127) / top))
    assert np.array_equal(quantize_i8(x)[0].numpy(), expected.astype(np.int8))
