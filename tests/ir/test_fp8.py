"""Products, tables and experts of e4m3: what their codes mean, and which types they have."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infc.ir.builder import ProgramBuilder
from infc.ir.e4m3 import E4M3_LEVELS, decode_e4m3
from infc.ir.errors import ProgramError
from infc.ir.formats import E4M3, E4M3_B128
from infc.ir.ops import get_op
from infc.ir.ops.quantized import quantize_rows_meaning
from infc.ir.parser import parse_program
from infc.ir.program import Attr, Node, Value, WeightExpr
from infc.ir.rounding import quantize_i8
from infc.ir.schemes import SCHEMES, get_scheme, weights_name
from infc.ir.text import print_program
from infc.ir.types import DType, Sym, TensorType
from infc.ir.weights import checkpoint, evaluate_expr, infer_weight

T = Sym("T")
NAMES = [name for name, scheme in SCHEMES.items() if scheme.is_fp8]
QUANTIZING = [name for name in NAMES if SCHEMES[name].activations is not None]


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def f32(*shape: int | Sym) -> TensorType:
    return TensorType(DType.F32, shape)


def u8(*shape: int | Sym) -> TensorType:
    return TensorType(DType.U8, shape)


def result(value: object) -> torch.Tensor:
    assert isinstance(value, torch.Tensor)
    return value


def dense(name: str, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The matrix by its definition, one element after the other, in float64."""
    rows, depth = codes.shape
    tile = SCHEMES[name].weight.tile
    found = torch.empty(rows, depth, dtype=torch.float64)
    for n in range(rows):
        for k in range(depth):
            scale = scales[n // tile, k // tile] if tile else scales[n]
            found[n, k] = E4M3_LEVELS[int(codes[n, k])] * float(scale)
    return found


def product(name: str, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """A product in a scheme, rows included."""
    scheme = SCHEMES[name]
    codes, scales = scheme.quantize(w)
    attrs = {"dtype": "f32", "scheme": name}
    if scheme.activations is None:
        return result(get_op("decoded_linear").meaning(x, codes, scales, **attrs))
    rows = quantize_rows_meaning(x, scheme.activations.group, scheme.activations.codes.name)
    return result(get_op("scaled_linear").meaning(*rows, codes, scales, **attrs))


def test_there_are_three_schemes_with_their_forms_for_weights() -> None:
    assert QUANTIZING == ["fp8", "fp8-tensor", "fp8-block"]
    assert [*QUANTIZING, *map(weights_name, QUANTIZING)] == NAMES
    assert not any(SCHEMES[name].is_exact for name in NAMES)


def test_codes_are_plain_bytes_and_scales_lie_beside_them() -> None:
    plain = TensorType(DType.BF16, (3, 300, 200))
    assert E4M3.code_type(plain) == E4M3_B128.code_type(plain) == u8(3, 300, 200)
    assert E4M3.scale_type(plain) == f32(3, 300)
    assert E4M3_B128.scale_type(plain) == f32(3, 3, 2)
    with pytest.raises(ProgramError, match="no fixed number of tiles"):
        E4M3_B128.scale_type(f32(T, 200))


@given(st.sampled_from(NAMES), st.integers(1, 140), st.integers(1, 140), st.integers(0, 2**31))
def test_a_matrix_is_levels_times_scales(name: str, rows: int, depth: int, seed: int) -> None:
    w, form = random(seed, rows, depth), SCHEMES[name].weight
    codes, scales = SCHEMES[name].quantize(w)
    exact = dense(name, codes, scales)
    decoded = form.decode(codes, scales, depth)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, exact.float())  # one product, rounded once
    wide = form.decode(codes, scales.double(), depth)
    assert torch.equal(wide, exact)
    picked = torch.tensor([[rows - 1, 0], [rows // 2, 0]])
    assert torch.equal(form.decode_rows(codes, scales, picked, depth), decoded[picked])
    # A mantissa of 3 bits, or half of the least step of the largest of what shares a scale.
    bound = (w.abs() / 16).maximum(w.abs().max() / 448 * 2.0**-10) * 1.00001
    assert bool(((decoded - w).abs() <= bound).all())


def test_one_scale_for_the_matrix_is_rows_with_equal_scales() -> None:
    w = random(0, 2, 5, 40) * torch.tensor([1.0, 7.0])[:, None, None]
    codes, scales = SCHEMES["fp8-tensor"].quantize(w)
    for own, row, matrix in zip(codes, scales, w, strict=True):
        assert row.unique().tolist() == [(matrix.abs().max() / 448).item()]
        assert int((own & 0x7F).max()) == 0x7E


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("depth", [1, 127, 128, 300])
def test_a_product_is_that_of_the_numbers(name: str, depth: int) -> None:
    scheme, x, w = SCHEMES[name], random(1, 4, depth), random(2, 140, depth)
    codes, scales = scheme.quantize(w)
    exact = x.double()
    if (how := scheme.activations) is not None:
        rows = quantize_rows_meaning(x, how.group, "e4m3")
        exact = how.codes.decode(rows[0], rows[1].double(), how.group, torch.float64)
    wanted = exact @ dense(name, codes, scales).T
    found = product(name, x, w)
    bound = 1e-6 * float((exact.abs() @ dense(name, codes, scales).abs().T).max())
    assert float((found - wanted).abs().max()) <= bound


def test_sums_of_tokens_are_exact_in_any_order() -> None:
    """As in `int8-token`, `reference` sums exactly; other backends are measured against that."""
    codes = torch.randint(0, 256, (9, 4000), generator=torch.Generator().manual_seed(3))
    codes = torch.where(codes & 0x7F == 0x7F, 0, codes).to(torch.uint8)
    one, attrs = torch.ones(9), {"dtype": "f64", "scheme": "fp8"}
    run = get_op("scaled_linear").meaning
    y = result(run(codes[:3], one[:3].double(), codes, one.double(), **attrs))
    levels = [[Fraction(level) for level in row] for row in decode_e4m3(codes).tolist()]
    for i in range(3):
        for j in (0, i, 8):
            exact = sum((a * b for a, b in zip(levels[i], levels[j], strict=True)), Fraction(0))
            assert Fraction(y[i, j].item()) == exact
    turned = torch.randperm(4000, generator=torch.Generator().manual_seed(4))
    again = run(codes[:3, turned], one[:3].double(), codes[:, turned], one.double(), **attrs)
    assert torch.equal(y, result(again))


@given(st.integers(1, 9), st.integers(1, 300), st.integers(0, 2**31))
def test_a_row_does_not_depend_on_others(rows: int, depth: int, seed: int) -> None:
    x, w = random(seed, rows, depth), random(seed + 1, 33, depth)
    together = product("fp8", x, w)
    for place in range(rows):
        assert torch.equal(product("fp8", x[place : place + 1], w)[0], together[place])


def test_a_head_is_decoded_in_parts_that_keep_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = random(1, 2, 200), random(2, 1000, 200)
    whole = {name: product(name, x.double(), w) for name in NAMES}
    monkeypatch.setattr("infc.ir.ops.quantized._WIDENED_ELEMENTS", 200 * 300)
    for name in NAMES:
        torch.testing.assert_close(product(name, x.double(), w), whole[name])


def test_rows_of_int8_stay_the_default() -> None:
    op, x = get_op("quantize_rows"), random(0, 3, 200)
    assert op.complete({}, [f32(T, 200)]) == {"group": 0, "codes": "i8"}
    assert torch.equal(quantize_rows_meaning(x)[0], quantize_i8(x)[0])
    attrs: dict[str, Attr] = {"codes": "e4m3"}
    assert op.infer([f32(T, 200)], attrs) == (u8(T, 200), f32(T))
    assert op.infer([f32(T, 200)], attrs | {"group": 128}) == (u8(T, 200), f32(T, 2))
    with pytest.raises(ProgramError, match="group is 32, expected 0 or 128"):
        op.infer([f32(T, 200)], attrs | {"group": 32})
    with pytest.raises(ProgramError, match="group is 128, expected 0 or 32"):
        op.infer([f32(T, 200)], {"group": 128})
    with pytest.raises(ProgramError, match="codes is"):
        op.infer([f32(T, 200)], {"codes": "e5m2"})


def test_types_are_inferred_and_refused() -> None:
    linear = get_op("scaled_linear")
    row: dict[str, Attr] = {"dtype": "bf16", "scheme": "fp8"}
    tile: dict[str, Attr] = {"dtype": "bf16", "scheme": "fp8-block"}
    x, w = (u8(T, 200), f32(T)), (u8(300, 200), f32(300))
    wanted = (TensorType(DType.BF16, (T, 300)),)
    assert linear.infer([*x, *w], row) == wanted
    assert linear.infer([x[0], f32(T, 2), w[0], f32(3, 2)], tile) == wanted
    for match, types, attrs in (
        ("x is i8", [TensorType(DType.I8, (T, 200)), x[1], *w], row),
        ("w is i8", [*x, TensorType(DType.I8, (300, 200)), w[1]], row),
        ("x_scale is f32", [*x, w[0], f32(3, 2)], tile),
        (r"w_scale is f32\[300\], expected f32\[3, 2\]", [x[0], f32(T, 2), *w], tile),
        ("w is u8", [*x, u8(300, 201), w[1]], row),
    ):
        with pytest.raises(ProgramError, match=match):
            linear.infer(types, attrs)
    decoded = get_op("decoded_linear")
    of_weights = {"dtype": "bf16", "scheme": "fp8-block-weights"}
    assert decoded.infer([f32(T, 200), w[0], f32(3, 2)], of_weights) == wanted
    with pytest.raises(ProgramError, match="fp8-block-weights multiplies rows as they are"):
        linear.infer([*x, *w], of_weights)


@pytest.mark.parametrize("name", NAMES)
def test_weights_become_codes_and_scales(name: str) -> None:
    kind, w = TensorType(DType.BF16, (2, 130, 8)), random(4, 2, 130, 8).bfloat16()
    form, expected = get_scheme(name).weight, get_scheme(name).quantize(w)
    for op, found, wanted in (
        ("codes", form.code_type(kind), expected[0]),
        ("scales", form.scale_type(kind), expected[1]),
    ):
        expr = WeightExpr(op, (checkpoint("w", kind),), {"scheme": name})
        assert infer_weight(expr) == found
        made = evaluate_expr(expr, {"checkpoint": lambda _: w})
        assert torch.equal(made, wanted)
        assert found.shape == tuple(made.shape)


@pytest.mark.parametrize("name", NAMES)
def test_experts_count_their_matrices_alone(name: str) -> None:
    """Scales of tiles have three dimensions, like the matrices."""
    form = SCHEMES[name].weight
    up, down = f32(4, 600, 200), f32(4, 200, 300)
    types = [f32(T, 200), TensorType(DType.I64, (T, 2)), f32(T, 2)]
    types += [form.code_type(up), form.scale_type(up), form.code_type(down), form.scale_type(down)]
    attrs: dict[str, Attr] = {"scheme": name, "act": "silu"}
    op = get_op("scaled_moe")
    assert op.infer(types, attrs) == (f32(T, 200),)
    assert op.cost(types, attrs, {"T": 3}).flops == 2 * 3 * 2 * (600 * 200 + 200 * 300)


@pytest.mark.parametrize("name", QUANTIZING)
def test_text_is_read_as_it_was_written(name: str) -> None:
    scheme = SCHEMES[name]
    assert scheme.activations is not None
    b = ProgramBuilder("one")
    b.symbol("T", 1, 8)
    x = b.input("x", f32(T, 200))
    plain = f32(300, 200)
    refs = [
        b.weight(f"w.{part}", kind, WeightExpr(part, (checkpoint("w", plain),), {"scheme": name}))
        for part, kind in (
            ("codes", scheme.weight.code_type(plain)),
            ("scales", scheme.weight.scale_type(plain)),
        )
    ]
    how = {"group": scheme.activations.group, "codes": scheme.activations.codes.name}
    rows: Node = b.add("quantize_rows", (x,), how)
    y: Value = b.emit("scaled_linear", *rows.outputs, *refs, dtype="f32", scheme=name)
    b.output(y)
    program = b.build()
    text = print_program(program)
    assert 'codes = "e4m3"' in text
    assert print_program(parse_program(text)) == text
