"""Nodes that a graph leaves out, as they would give what is there already."""

from __future__ import annotations

from infc.codegen.onnx import contrib
from infc.codegen.onnx.emitter import Emitter
from infc.codegen.onnx.graph import Graph
from infc.codegen.onnx.lower import LOWERINGS
from infc.ir.builder import ProgramBuilder
from infc.ir.types import DType, Sym, TensorType


def _graph() -> tuple[Graph, str]:
    graph = Graph()
    return graph, graph.input("x", DType.F32, ("T", 12))


def _kinds(graph: Graph, result: str) -> list[str]:
    graph.op("Identity", [result], ["y"])
    graph.output("y", DType.F32, ("T", 12))
    return [node.op_type for node in graph.model("m", {}).graph.node]


def test_what_was_reshaped_is_reshaped_once() -> None:
    graph, x = _graph()
    heads = graph.reshape(graph.op("Neg", [x]), [-1, 3, 4])
    assert _kinds(graph, graph.reshape(heads, [1, -1, 12])) == ["Neg", "Reshape", "Identity"]


def test_sizes_taken_from_what_is_reshaped_are_those_of_its_shape() -> None:
    graph, x = _graph()
    heads = graph.reshape(graph.op("Neg", [x]), [-1, 3, 4])
    assert _kinds(graph, graph.reshape(heads, [0, 12])).count("Reshape") == 2


def test_a_value_keeps_the_shape_it_has() -> None:
    graph, x = _graph()
    turned = graph.op("Neg", [x])
    graph.shaped(turned, [-1, 12])
    back = graph.reshape(graph.reshape(turned, [-1, 3, 4]), [-1, 12])
    assert back == turned
    assert _kinds(graph, back) == ["Neg", "Identity"]


def test_a_shape_of_two_unknown_sizes_is_not_compared() -> None:
    graph, x = _graph()
    turned = graph.op("Neg", [x])
    graph.shaped(turned, [-1, -1])
    assert graph.reshape(turned, [-1, 12]) != turned


def test_a_number_takes_a_shape_that_is_known_only_in_a_step() -> None:
    graph, x = _graph()
    number = graph.op("ReduceSum", [x], keepdims=0)
    graph.shaped(number, [])
    ones = graph.op("Concat", [graph.const([1]), graph.const([1])], axis=0)
    assert graph.op("Reshape", [number, ones]) != number


def test_rows_that_stand_for_their_codes_and_scales_keep_their_shape() -> None:
    b = ProgramBuilder("rows", phase="lowered")
    b.symbol("T", 1, 64)
    x = b.emit("neg", b.input("x", TensorType(DType.F32, (Sym("T"), 64))))
    b.add("quantize_rows", (x,), {"group": 32, "codes": "i8"})
    y = b.emit("reshape", x, shape=(Sym("T", scale=32), 2))
    b.outputs = [y]
    emitter = Emitter(b.build())
    emitter.declare_inputs()
    emitter.emit({**LOWERINGS, **contrib.LOWERINGS})
    assert [node.op_type for node in emitter.graph.nodes] == ["Neg", "Reshape"]


def test_equal_nodes_are_one_and_different_ones_are_not() -> None:
    graph, x = _graph()
    one, two = graph.op("Elu", [x], alpha=1.0), graph.op("Elu", [x], alpha=2.0)
    assert graph.op("Elu", [x], alpha=1.0) == one != two
    written = [graph.op("Neg", [x], [name]) for name in ("a", "b")]
    assert written == ["a", "b"]


def test_what_nothing_reads_is_left_out_with_its_constants() -> None:
    graph, x = _graph()
    graph.op("Add", [x, graph.const(3.0, DType.F32)])
    kept = graph.op("Add", [x, graph.const(4.0, DType.F32)])
    assert _kinds(graph, kept) == ["Add", "Identity"]
    assert len(graph.model("m", {}).graph.initializer) == 1


def test_moved_numbers_are_as_exact_as_before() -> None:
    graph, x = _graph()
    rounded = graph.op("Cast", [x], to=1)
    graph.exact[rounded] = DType.BF16
    moved = graph.op("Transpose", [rounded], perm=[1, 0])
    joined = graph.op("Concat", [moved, moved], axis=0)
    assert graph.exact[joined] is DType.BF16
    assert graph.op("Concat", [joined, x], axis=0) not in graph.exact
    assert graph.op("Exp", [moved]) not in graph.exact
