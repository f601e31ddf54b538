"""Ops that pick rows or elements by index, and that put a number where an index says."""

from __future__ import annotations

from typing import Final

from ....ir.program import Node
from ..emitter import Emitter, Lowering, axis_of
from ..types import computed


def _embedding(emitter: Emitter, node: Node) -> None:
    """The rows are widened, not the table."""
    table, ids = node.inputs
    rows = emitter.graph.op("Gather", [emitter.stored(table), emitter.operand(ids)], axis=0)
    dtype = emitter.type_of(table).dtype
    if emitter.held_narrow(dtype):
        emitter.give(node, rows, held=dtype)
    else:
        emitter.give(node, emitter.widened(rows, dtype))


def _take(emitter: Emitter, node: Node) -> None:
    x, index = map(emitter.operand, node.inputs)
    emitter.give(node, emitter.graph.op("Gather", [x, index], axis=axis_of(node)))


def _gather(emitter: Emitter, node: Node) -> None:
    x, index = map(emitter.operand, node.inputs)
    emitter.give(node, emitter.graph.op("GatherElements", [x, index], axis=axis_of(node)))


def _scatter(emitter: Emitter, node: Node) -> None:
    graph = emitter.graph
    x, index = map(emitter.operand, node.inputs)
    value = graph.const(node.attrs["value"], computed(node.output.type.dtype))
    values = graph.op("Expand", [value, graph.op("Shape", [index])])
    scattered = graph.op("ScatterElements", [x, index, values], axis=axis_of(node))
    emitter.give(node, scattered)


LOWERINGS: Final[dict[str, Lowering]] = {
    "embedding": _embedding,
    "take": _take,
    "gather": _gather,
    "scatter": _scatter,
}
