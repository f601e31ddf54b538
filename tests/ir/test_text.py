"""The text form: round trips of what random programs do not hold, and places in errors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.ir.builder import ProgramBuilder
from infc.ir.errors import ParseError
from infc.ir.program import Attr, ModelSpec, Program, WeightExpr
from infc.ir.resources import KvGroup
from infc.ir.text import parse_expr, parse_program, print_expr, print_program
from infc.ir.types import DType, Sym, TensorType

from ..renaming import rename_values

FLOATS = st.floats(allow_nan=False)
SCALARS: st.SearchStrategy[Attr] = (
    st.none() | st.booleans() | st.integers() | FLOATS | st.text(max_size=8)
)
ATTRS: st.SearchStrategy[Attr] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6
)
MAPS = st.dictionaries(st.text(max_size=6), ATTRS, max_size=3)
EXPRS = st.recursive(
    st.builds(WeightExpr, st.just("checkpoint"), st.just(()), MAPS),
    lambda inner: st.builds(
        WeightExpr, st.sampled_from(["concat", "pack"]), st.lists(inner).map(tuple), MAPS
    ),
    max_leaves=4,
)


def same(a: object, b: object) -> bool:
    """Equality that tells 1 from 1.0 and True, and 0.0 from -0.0."""
    return repr(a) == repr(b)


def small() -> Program:
    b = ProgramBuilder("small", phase="fused")
    b.symbol("T", 1, 9)
    x = b.input("x", TensorType(DType.F32, (Sym("T"), 8)))
    b.layer = 3
    node = b.add("add_rms_norm", (x, x, b.weight("w", TensorType(DType.F32, (8,)))), {"eps": 1e-5})
    b.source = 'a "quoted" place'
    y = b.emit("mul", node.outputs[1], -0.0)
    b.output(y, node.outputs[0])
    return b.build()


NAMES = st.lists(st.text(max_size=6), min_size=2, max_size=2, unique=True)


@given(NAMES)
def test_names_of_outputs_survive(names: list[str]) -> None:
    program = replace(small(), output_names=tuple(names))
    assert parse_program(print_program(program)) == program
    assert list(program.named_outputs()) == names


def test_outputs_are_named_in_text() -> None:
    program = small()
    assert print_program(program).splitlines()[-2] == "  output %2, %0"
    named = replace(program, output_names=("logits", "a b"))
    assert print_program(named).splitlines()[-2] == '  output logits = %2, "a b" = %0'
    # Text of before there were names: a step's own outputs by their places.
    old = parse_program(print_program(program))
    assert old.output_names == ()
    assert old.named_outputs() == dict(zip(("logits", "hidden"), program.outputs, strict=True))
    assert old.output("a b") is None


@given(MAPS)
def test_attributes_of_every_kind_survive(attrs: dict[str, Attr]) -> None:
    program = replace(small(), attrs=attrs)
    again = parse_program(print_program(program))
    assert again == program
    assert same(dict(again.attrs), attrs)


@given(EXPRS)
def test_weight_expressions_survive(expr: WeightExpr) -> None:
    assert same(parse_expr(print_expr(expr)), expr)


@given(st.lists(st.text(max_size=6), min_size=4, max_size=4, unique=True), st.text(max_size=6))
def test_names_of_every_kind_survive(names: list[str], name: str) -> None:
    left = iter(names)
    program = rename_values(replace(small(), name=name), lambda value: next(left))
    weight = replace(program.weights["w"], name=name)
    node = program.nodes[0]
    assert parse_program(print_program(program)) == program
    changed = replace(program, weights={name: weight}, nodes=(), outputs=())
    assert parse_program(print_program(changed)) == changed
    assert node.layer == 3


def test_spec_resources_sources_and_not_a_number_survive() -> None:
    group = KvGroup("w-8", (0, 2), 2, 64, 64, "bf16", 16, 8)
    spec = ModelSpec("llama", 2, 64, 4, 2, 16, 100, 512, (None, 8), 12345)
    program = replace(small(), resources=(group,), spec=spec, attrs={"x": (math.nan, -math.inf)})
    again = parse_program(print_program(program))
    assert again.resources == program.resources
    assert again.spec == spec
    assert same(again.attrs, program.attrs)
    assert [node.source for node in again.nodes] == [None, 'a "quoted" place']


def test_what_has_a_default_may_be_left_out() -> None:
    program = parse_program("""
        program "short" {   # the phase, spec, bounds and weight's expression are left out
          symbol T
          weight @w: f32[8]
          input %x: f32[T, 8]
          %y = rms_norm(%x, @w) {eps = 1} : f32[T, 8]   // and an attribute with a default
          output %y
        }""")
    assert program.phase == "captured"
    assert program.weights["w"].expr == WeightExpr("checkpoint", (), {"name": "w"})
    attrs = {"eps": 1.0, "round_before_scale": True, "dtype": None}
    assert program.nodes[0].attrs == attrs
    assert program.symbols["T"].low == 1


BODY = 'program "p" {\n  symbol T: 1..4\n  weight @w: f32[4]\n  input %x: f32[T, 4]\n'


@pytest.mark.parametrize(
    ("text", "line", "column", "match"),
    [
        ("", 1, 1, "'program'"),
        ('program "p" phase done {}', 1, 19, "unknown phase 'done'"),
        ('program "p', 1, 9, "unterminated string"),
        ('program "p" { ?', 1, 15, "unexpected character '\\?'"),
        (BODY, 5, 1, "end of the text"),
        (BODY + "  %y = exq(%x) : f32[T, 4]\n}", 5, 8, "did you mean"),
        (BODY + "  %y = exp(%z) : f32[T, 4]\n}", 5, 12, "%z is not defined"),
        (BODY + "  %y = exp(@v) : f32[T, 4]\n}", 5, 12, "@v is not declared"),
        (BODY + "  %x = exp(%x) : f32[T, 4]\n}", 5, 3, "%x is defined twice"),
        (BODY + "  %y = exp(%x, %x) : f32[T, 4]\n}", 5, 8, "2 operands"),
        (BODY + "  %y = exp(%x) {a = 1} : f32[T, 4]\n}", 5, 8, "no attribute a"),
        (BODY + "  %y = softmax(%x) {dim = 1, dim = 1} : f32[T, 4]\n}", 5, 30, "given twice"),
        (BODY + "  %y = exp(%x) : f32[T, 4], f32[T]\n}", 5, 8, "1 results, but 2 types"),
        (BODY + "  %y = exp(%x) : float[T, 4]\n}", 5, 18, "unknown element type 'float'"),
        (BODY + "  %y = exp(%x) : f32[0*T]\n}", 5, 22, "at least 1"),
        (BODY + "  output %q\n}", 5, 10, "%q is not defined"),
        (BODY + "  output a = %x, %x\n}", 5, 18, "either all outputs have names, or none"),
        (BODY + "  output %x, a = %x\n}", 5, 14, "either all outputs have names, or none"),
        (BODY + "  output a = %x, a = %x\n}", 5, 18, "two outputs have the name a"),
        (BODY + "  output a %x\n}", 5, 12, "expected '='"),
        (BODY + "  outputs %x\n}", 5, 3, "unknown statement 'outputs'"),
        (BODY + "  symbol T: 1..4\n}", 5, 10, "declared twice"),
        (BODY + "  symbol R: 4..1\n}", 5, 10, "empty"),
        (BODY + "  weight @w: f32[4]\n}", 5, 10, "defined twice"),
        (BODY + "  spec {layers = 2}\n}", 5, 8, "no field layers"),
        (BODY + '  spec {num_layers = "two"}\n}', 5, 8, "cannot be 'two'"),
        (BODY + "  resource kv {layers = (0,)}\n}", 5, 12, "lacks num_kv_heads"),
        (BODY + '  attr {a = "\\q"}\n}', 5, 13, "malformed string"),
        (BODY + "  attr {a = " + "(" * 200 + "}", 5, 114, "too deeply"),
        (BODY + "  attr {a = " + "9" * 5000 + "}\n}", 5, 13, "too long"),
        (BODY + "}\nmore", 6, 1, "expected the end"),
    ],
)
def test_errors_say_where(text: str, line: int, column: int, match: str) -> None:
    with pytest.raises(ParseError, match=match) as caught:
        parse_program(text, source="x.ir")
    assert (caught.value.line, caught.value.column) == (line, column)
    assert str(caught.value).startswith(f"x.ir:{line}:{column}: ")


@given(st.text('program"{}%@=(),:[]. exp\n0123456789-', max_size=40))
def test_any_text_gives_a_parse_error_at_worst(text: str) -> None:
    with pytest.raises(ParseError):
        parse_program(text)


def test_what_the_parser_fills_in_is_left_out() -> None:
    text = """program "short" phase captured {
  symbol T: 1..64
  weight @b: f32[8]
  weight @a: f32[8] = checkpoint{name = "elsewhere"}
  weight @unused: f32[8]
  input %x: f32[T, 8]
  %0 = rms_norm(%x, @b) {eps = 1e-06} : f32[T, 8]
  %1 = rms_norm(%0, @a) {eps = 0.5} : f32[T, 8]
  %2 = slice(%1) {dim = 1, start = 0, stop = 4} : f32[T, 4]
  output %2
}
"""
    shuffled = """program "short" phase captured {
  symbol T: 1..64
  weight @unused: f32[8] = checkpoint{name = "unused"}
  weight @a: f32[8] = checkpoint{name = "elsewhere"}
  weight @b: f32[8] = checkpoint{name = "b"}
  input %x: f32[T, 8]
  %0 = rms_norm(%x, @b) {eps = 1e-06, round_before_scale = true} : f32[T, 8]
  %1 = rms_norm(%0, @a) {eps = 0.5, round_before_scale = true} : f32[T, 8]
  %2 = slice(%1) {dim = 1, start = 0, stop = 4, step = 1} : f32[T, 4]
  output %2
}
"""
    assert print_program(parse_program(shuffled)) == text.replace("start = 0, ", "")
    assert parse_program(shuffled) == parse_program(text)
