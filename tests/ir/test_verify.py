"""The verifier: every kind of breach is named, with the node."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from infc.ir.builder import ProgramBuilder
from infc.ir.errors import ProgramError
from infc.ir.ops.state import cache_of
from infc.ir.program import Node, Program, Value, WeightRef
from infc.ir.resources import KvGroup
from infc.ir.text import parse_program, print_node
from infc.ir.types import DType, Sym, SymbolRange, TensorType
from infc.ir.verify import verify
from infc.ir.weights import checkpoint

from ..renaming import rename_values

T = Sym("T")
ROW = TensorType(DType.F32, (T, 8))
KV = KvGroup("kv", (0,), 2, 4, 4, "f32", 16)


def captured() -> Program:
    b = ProgramBuilder("p")
    b.symbol("T")
    x = b.input("x", ROW)
    y = b.emit("linear", x, b.weight("w", TensorType(DType.F32, (8, 8))), name="y")
    b.layer = 0
    heads = b.emit("reshape", y, shape=(T, 2, 4), name="heads")
    out = b.emit("attention", heads, heads, heads, layer=0, scale=1.0, name="out")
    b.output(out)
    return b.build()


def change(index: int, **fields: object) -> Callable[[Program], Program]:
    def apply(program: Program) -> Program:
        nodes = list(program.nodes)
        nodes[index] = replace(nodes[index], **fields)  # type: ignore[arg-type]
        return program.with_nodes(tuple(nodes))

    return apply


def weights(kind: TensorType, name: str = "w", **leaf: TensorType) -> Callable[[Program], Program]:
    def apply(program: Program) -> Program:
        entry = replace(program.weights["w"], type=kind, expr=checkpoint("w", leaf.get("leaf")))
        return replace(program, weights={name: entry})

    return apply


def test_what_the_builder_makes_is_legal() -> None:
    program = captured()
    verify(program)
    # Not for want of a look: of the same program without its first node all is refused.
    with pytest.raises(ProgramError, match="y"):
        verify(program.with_nodes(program.nodes[1:]))


BREACHES: list[tuple[str, Callable[[Program], Program]]] = [
    ("unknown phase", lambda p: replace(p, phase="done")),
    (
        "attention of layer 0: attention is not legal in phase lowered",
        lambda p: replace(p, phase="lowered"),
    ),
    ("unknown op linaer .*linear", change(0, op="linaer")),
    (
        "%y = linear: declared .*, inferred",
        change(0, outputs=(Value("y", TensorType(DType.F16, (T, 8))),)),
    ),
    ("lack window", change(2, attrs={"layer": 0, "scale": 1.0})),
    ("no attribute skeme", change(0, attrs={"skeme": "dense"})),
    ("stored form", change(1, attrs={"shape": ("1*T", 2, 4)})),
    ("weight @v is not declared", change(0, inputs=(Value("x", ROW), WeightRef("v")))),
    ("%z is used before", change(1, inputs=(Value("z", ROW),))),
    ("%y is read as", change(1, inputs=(Value("y", TensorType(DType.F32, (T, 4, 2))),))),
    ("takes", change(0, inputs=(Value("x", ROW),))),
    ("defined twice", change(1, outputs=(Value("y", TensorType(DType.F32, (T, 2, 4))),))),
    ("used before", lambda p: p.with_nodes(tuple(reversed(p.nodes)))),
    ("two|twice", lambda p: replace(p, inputs=(*p.inputs, *p.inputs))),
    ("output %q", lambda p: replace(p, outputs=(Value("q", ROW),))),
    ("output %out", lambda p: replace(p, outputs=(Value("out", ROW),))),
    ("have 3 names", lambda p: replace(p, output_names=("a", "b", "c"))),
    ("have the name a", lambda p: replace(p, outputs=p.outputs * 2, output_names=("a", "a"))),
    ("symbol T .* not declared", lambda p: replace(p, symbols={})),
    (
        "can be negative",
        lambda p: replace(p, inputs=(Value("x", TensorType(DType.F32, (Sym("T", 1, -3),))),)),
    ),
    ("under the name v", weights(TensorType(DType.F32, (8, 8)), "v")),
    ("must be constant", weights(TensorType(DType.F32, (T, 8)))),
    ("its expression is", weights(TensorType(DType.F32, (8, 8)), leaf=TensorType(DType.F32, (8,)))),
    ("two resources", lambda p: replace(p, resources=(KV, KV))),
    ("layer 0 is also in kv", lambda p: replace(p, resources=(KV, replace(KV, name="other")))),
]


@pytest.mark.parametrize(("match", "breach"), BREACHES, ids=[match for match, _ in BREACHES])
def test_a_breach_is_named(match: str, breach: Callable[[Program], Program]) -> None:
    with pytest.raises(ProgramError, match=match):
        verify(breach(captured()))


def test_outputs_without_names_that_became_one_value_have_different_names() -> None:
    """As common-subexpressions makes them; a value may also be called as a step's own output."""
    program = captured()
    (out,) = program.outputs
    several = replace(program, outputs=(out,) * 5)
    called = rename_values(several, lambda value: "hidden" if value == out else value.name)
    for one in (several, called):
        verify(one)
        assert len(one.named_outputs()) == 5
        assert list(one.named_outputs())[:2] == ["logits", "hidden"]


def lowered(**attrs: object) -> Program:
    b = ProgramBuilder("p", phase="lowered")
    b.symbol("T", SymbolRange(1, 9).low, 9)
    b.resources = (KV,)
    x = b.input("x", TensorType(DType.F32, (T, 2, 4)))
    b.add("kv_write", (x, x), {"layer": 0, "group": "kv"} | attrs)
    b.output(b.emit("paged_attention", x, layer=0, group="kv", scale=1.0))
    return b.build()


def test_state_needs_a_resource_that_serves_the_layer() -> None:
    verify(lowered())
    for breach in ({"layer": 1}, {"group": "other"}):
        with pytest.raises(ProgramError, match=r"kv_write.*has no cache of layer"):
            verify(lowered(**breach))
    with pytest.raises(ProgramError, match="not legal in phase fused"):
        verify(replace(lowered(), phase="fused"))


SHARED = """
    program "p" phase lowered {
      symbol T
      resource kv {layers = (0,), num_kv_heads = 2, key_head_dim = 4, value_head_dim = 4,
                   dtype = "f32", block_size = 16, window = 8}
      input %x: f32[T, 2, 4]
      kv_write(%x, %x) {layer = 0, group = "kv"}
      %0 = paged_attention(%x) {layer = 0, group = "kv", scale = 1.0, window = 8} : f32[T, 2, 4]
      %1 = paged_attention(%0) {layer = 1, cache = 0, group = "kv", scale = 1.0, window = 4}
           : f32[T, 2, 4]
      output %1
    }"""


def test_a_layer_may_read_the_cache_of_another() -> None:
    program = parse_program(SHARED)
    verify(program)
    first, second = (node for node in program.nodes if node.op == "paged_attention")
    assert (cache_of(first.attrs), cache_of(second.attrs)) == (0, 0)
    assert first.attrs["cache"] is None, "its own goes without saying"
    assert "cache = 0" in print_node(second) and "cache" not in print_node(first)
    own = parse_program(SHARED.replace("{layer = 0, group", "{layer = 0, cache = 0, group"))
    assert own == program


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("cache = 0", "cache = 1", "%1 = paged_attention: resource kv has no cache of layer 1"),
        ("kv_write(%x, %x) {layer = 0", "kv_write(%x, %x) {layer = 1", "kv_write.* no cache"),
        ('kv_write(%x, %x) {layer = 0, group = "kv"}', "", "%0 = .*which no node before it writes"),
        ("output", 'kv_write(%x, %x) {layer = 0, group = "kv"} output', "is written twice"),
        ("window = 4}", "window = 9}", "%1 .*sees 9 positions, of which resource kv keeps 8"),
        (", window = 4}", "}", "%1 .*sees all positions, of which resource kv keeps 8"),
    ],
)
def test_what_a_cache_cannot_give_is_named(old: str, new: str, match: str) -> None:
    text = SHARED.replace(old, new)
    assert text != SHARED
    with pytest.raises(ProgramError, match=match):
        verify(parse_program(text))


def test_a_node_of_parsed_text_is_checked_for_types() -> None:
    program = parse_program("""
        program "p" { symbol T input %x: f32[T, 8] %y = exp(%x) : f32[T, 9] output %y }""")
    with pytest.raises(ProgramError, match=r"%y = exp: declared \(f32\[T, 9\]\), inferred"):
        verify(program)


def test_a_node_without_results_is_described() -> None:
    program = lowered()
    bad = Node("kv_write", program.nodes[0].inputs[:1], (), program.nodes[0].attrs, layer=4)
    with pytest.raises(ProgramError, match=r"kv_write of layer 4: .*takes"):
        verify(program.with_nodes((bad,)))
