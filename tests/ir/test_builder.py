"""The builder: fresh stable names, inferred types, and edits."""

from __future__ import annotations

import pytest

from infc.ir.builder import ProgramBuilder, remove_dead_code
from infc.ir.errors import ProgramError
from infc.ir.program import Operand, Program, Value, WeightExpr
from infc.ir.resources import KvGroup
from infc.ir.types import DType, Sym, TensorType
from infc.ir.verify import verify

ROW = TensorType(DType.F32, (Sym("T"), 8))


def start() -> tuple[ProgramBuilder, Value]:
    b = ProgramBuilder("p")
    b.symbol("T")
    return b, b.input("x", ROW)


def chain() -> Program:
    """y = tanh(relu(x)) twice over, the second time without a use."""
    b, x = start()
    first = b.emit("relu", x)
    b.output(b.emit("tanh", first, name="y"))
    b.emit("tanh", b.emit("relu", x), name="y")
    b.weight("unused", ROW.__class__(DType.F32, (8,)))
    return b.build()


def test_names_are_fresh_and_count_up() -> None:
    program = chain()
    assert [str(node.output) for node in program.nodes] == ["%0", "%y", "%1", "%y_1"]
    b = ProgramBuilder.from_program(program)
    # Names of nodes that are not copied stay taken, so a dump diffs cleanly with the one before.
    assert b.emit("exp", program.inputs[0]).name == "2"
    assert b.emit("exp", program.inputs[0], name="y").name == "y_2"
    with pytest.raises(ProgramError, match="taken"):
        b.input("x", ROW)


def test_types_are_inferred_and_layers_kept() -> None:
    b, x = start()
    b.layer, b.source = 2, "layers.2.mlp"
    node = b.add("topk", (x,), {"k": 2})
    assert [v.type.dtype for v in node.outputs] == [DType.F32, DType.I64]
    assert (node.layer, node.source) == (2, "layers.2.mlp")
    heads = b.emit("reshape", x, shape=(Sym("T"), 2, 4))
    attention = b.add("attention", (heads, heads, heads), {"layer": 5, "scale": 1})
    assert attention.layer == 5
    assert attention.attrs["scale"] == 1.0
    with pytest.raises(ProgramError, match="results; use add"):
        b.emit("topk", x, k=1)
    with pytest.raises(ProgramError, match="not declared"):
        b.emit("linear", x, ProgramBuilder("q").weight("w", ROW))
    with pytest.raises(ProgramError, match="names"):
        b.add("relu", (x,), names=("a", "b"))


def test_a_weight_has_one_definition() -> None:
    b, _ = start()
    kind = TensorType(DType.F32, (8,))
    assert b.weight("w", kind) == b.weight("w", kind)
    with pytest.raises(ProgramError, match="differently"):
        b.weight("w", kind, WeightExpr("checkpoint", (), {"name": "v"}))
    assert b.fresh_weight_name("w") == "w.1"
    assert b.fresh_weight_name("v") == "v"


def test_dead_code_goes_but_effects_stay() -> None:
    clean = remove_dead_code(chain())
    assert [str(node.output) for node in clean.nodes] == ["%0", "%y"]
    assert not clean.weights
    assert remove_dead_code(chain(), keep_weights=True).weights
    b, x = start()
    b.phase = "lowered"
    b.resources = (KvGroup("kv", (0,), 2, 4, 4, "f32", 16),)
    heads = b.emit("reshape", x, shape=("T", 2, 4))
    b.add("kv_write", (heads, heads), {"layer": 0, "group": "kv"})
    b.output(x)
    program = b.build()
    verify(program)
    assert remove_dead_code(program) is program


def replacing(program: Program, *pairs: tuple[Value, Operand]) -> Program:
    """The program copied by a builder that was told to replace values."""
    builder = ProgramBuilder.from_program(program)
    for old, new in pairs:
        builder.replace(old, new)
    for node in program.nodes:
        builder.copy(node)
    return builder.build()


def test_replacing_follows_chains_and_outputs() -> None:
    program = chain()
    first, y, second, _ = (node.output for node in program.nodes)
    x = program.inputs[0]
    replaced = replacing(program, (second, first), (first, x), (y, second))
    assert replaced.nodes[1].inputs == (x,)
    assert replaced.nodes[3].inputs == (x,)
    assert replaced.outputs == (x,)
    with pytest.raises(ProgramError, match=r"replaced by 1\.0"):
        replacing(program, (y, 1.0))


def test_copying_can_infer_types_anew() -> None:
    program = chain()
    b = ProgramBuilder.from_program(program)
    wide = Value("x", TensorType(DType.F64, (Sym("T"), 8)))
    b.inputs = [wide]
    b.replace(program.inputs[0], wide)
    for node in program.nodes:
        b.copy(node, reinfer=True)
    changed = b.build()
    verify(changed)
    assert {v.type.dtype for node in changed.nodes for v in node.outputs} == {DType.F64}
    assert changed.outputs[0].type.dtype is DType.F64
