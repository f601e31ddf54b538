"""Mixture of experts: every expert over every row, weighted by a matrix that is mostly zero.

ONNX has no op for it. All experts are computed, so that there is nothing to sort; an expert that a
row was not routed to is selected away, not multiplied by zero, as it may have overflowed.
"""

from __future__ import annotations

from typing import Final

from ....ir.program import Node, Operand
from ....ir.types import DType
from ..emitter import Emitter, Lowering
from ..types import STORED
from .pointwise import activate


def _moe(emitter: Emitter, node: Node) -> None:
    graph = emitter.graph
    x, index, weight, gate_up, down, *biases = node.inputs
    experts = emitter.fixed(gate_up, 0)
    rows = emitter.rounded(emitter.operand(x), emitter.type_of(gate_up).dtype)
    hidden = _product(emitter, rows, gate_up, biases[:1])  # [E, T, 2I]
    hidden = _gated(emitter, node, hidden)
    hidden = emitter.rounded(hidden, emitter.type_of(down).dtype)
    result = _product(emitter, hidden, down, biases[1:])  # [E, T, H]
    index_name, weight_name = emitter.operand(index), emitter.operand(weight)
    ids = graph.const([[[expert]] for expert in range(experts)])  # [E, 1, 1]
    chosen = graph.op("Equal", [graph.op("Unsqueeze", [index_name, graph.const([0])]), ids])
    share = graph.op("Where", [chosen, weight_name, graph.const(0.0, DType.F32)])  # [E, T, K]
    share = graph.op("ReduceSum", [share, graph.const([2])], keepdims=1)  # [E, T, 1]
    used = graph.op("Cast", [chosen], to=STORED[DType.I32])
    used = graph.op(
        "Cast", [graph.op("ReduceMax", [used, graph.const([2])])], to=STORED[DType.BOOL]
    )
    result = graph.op("Mul", [result, share])
    result = graph.op("Where", [used, result, graph.const(0.0, DType.F32)])
    emitter.give(node, graph.op("ReduceSum", [result, graph.const([0])], keepdims=0))


def _product(emitter: Emitter, x: str, matrices: Operand, bias: list[Operand]) -> str:
    """x `[T, K]` or `[E, T, K]` by matrices `[E, N, K]`, plus biases `[E, N]`."""
    graph = emitter.graph
    turned = graph.op("Transpose", [emitter.operand(matrices)], perm=[0, 2, 1])
    result = graph.op("MatMul", [x, turned])
    for one in bias:
        column = graph.op("Unsqueeze", [emitter.operand(one), graph.const([1])])
        result = graph.op("Add", [result, column])
    return result


def _gated(emitter: Emitter, node: Node, hidden: str) -> str:
    """act(gate) * (up + shift), each within the limit."""
    graph, alpha, limit = emitter.graph, node.attrs["alpha"], node.attrs["limit"]
    gate, up = graph.split(hidden, -1)
    if isinstance(limit, float):
        most, least = graph.const(limit, DType.F32), graph.const(-limit, DType.F32)
        gate, up = graph.op("Clip", [gate, "", most]), graph.op("Clip", [up, least, most])
    if alpha == 1:
        turned = activate(graph, gate, str(node.attrs["act"]))
    else:
        turned = graph.op("Swish", [gate], alpha=float(str(alpha)))
    if node.attrs["shift"]:
        up = graph.op("Add", [up, graph.const(node.attrs["shift"], DType.F32)])
    return graph.op("Mul", [turned, up])


LOWERINGS: Final[dict[str, Lowering]] = {"moe": _moe}
