"""Matrix products by weights and of two values, and the gated activation between them."""

from __future__ import annotations

from typing import Final

from ....ir.program import Node
from ....ir.types import DType
from ..emitter import Emitter, Lowering
from .pointwise import activate


def _linear(emitter: Emitter, node: Node) -> None:
    x, w = node.inputs[:2]
    graph, kind = emitter.graph, emitter.type_of(x)
    held = emitter.type_of(w).dtype
    rows = emitter.rows(x, held)
    if kind.rank != 2:
        rows = graph.reshape(rows, [-1, emitter.fixed(x, -1)])
    biases = [emitter.operand(bias) for bias in node.inputs[2:]]
    if emitter.held_narrow(held):
        result = graph.op("Gemm", [rows, emitter.matrix(w)], transB=1)
        if biases:
            result = graph.op("Add", [emitter.widened(result, held), *biases])
            held = DType.F32
    else:
        result = graph.op("Gemm", [rows, emitter.matrix(w), *biases], transB=1)
        held = DType.F32
    if kind.rank != 2:
        result = graph.op("Reshape", [result, emitter.shape(node.output.type.shape)])
    emitter.give(node, result, held=held)


def _matmul(emitter: Emitter, node: Node) -> None:
    emitter.give(node, emitter.graph.op("MatMul", [*map(emitter.operand, node.inputs)]))


def _gated_act(emitter: Emitter, node: Node) -> None:
    gate, up = emitter.graph.split(emitter.operand(node.inputs[0]), -1)
    turned = activate(emitter.graph, gate, str(node.attrs["act"]))
    emitter.give(node, emitter.graph.op("Mul", [turned, up]))


LOWERINGS: Final[dict[str, Lowering]] = {
    "linear": _linear,
    "matmul": _matmul,
    "gated_act": _gated_act,
}
