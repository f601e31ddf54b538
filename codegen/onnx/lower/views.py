"""Ops that rearrange elements, and those that make them from nothing."""

from __future__ import annotations

from typing import Any, Final

from ....ir.program import Node
from ....ir.shapes import parse_dim
from ....ir.types import DType
from ..emitter import Emitter, Lowering, axis_of
from ..types import STORED, computed


def _dims(node: Node) -> Any:
    return node.attrs["shape"]


def _reshape(emitter: Emitter, node: Node) -> None:
    x = emitter.operand(node.inputs[0])
    emitter.give(node, emitter.graph.op("Reshape", [x, emitter.shape(_dims(node))]))


def _transpose(emitter: Emitter, node: Node) -> None:
    x, perm = emitter.operand(node.inputs[0]), node.attrs["perm"]
    emitter.give(node, emitter.graph.op("Transpose", [x], perm=perm))


def _expand(emitter: Emitter, node: Node) -> None:
    x = emitter.operand(node.inputs[0])
    shape = emitter.shape(_dims(node), infer=False)
    emitter.give(node, emitter.graph.op("Expand", [x, shape]))


def _slice(emitter: Emitter, node: Node) -> None:
    start: Any = node.attrs["start"]
    stop: Any = node.attrs["stop"]
    edges = [emitter.size(parse_dim(edge)) for edge in (start, stop)]
    rest = [emitter.graph.const([node.attrs[name]]) for name in ("dim", "step")]
    x = emitter.operand(node.inputs[0])
    emitter.give(node, emitter.graph.op("Slice", [x, *edges, *rest]))


def _concat(emitter: Emitter, node: Node) -> None:
    parts = [emitter.operand(part) for part in node.inputs]
    emitter.give(node, emitter.graph.op("Concat", parts, axis=axis_of(node)))


def _full(emitter: Emitter, node: Node) -> None:
    value = emitter.graph.const(node.attrs["value"], computed(node.output.type.dtype))
    shape = emitter.shape(_dims(node), infer=False)
    emitter.give(node, emitter.graph.op("Expand", [value, shape]))


def _iota(emitter: Emitter, node: Node) -> None:
    size: Any = node.attrs["size"]
    graph = emitter.graph
    stop = graph.op("Squeeze", [emitter.size(parse_dim(size))])
    numbers = graph.op("Range", [graph.const(0), stop, graph.const(1)])
    dtype = computed(node.output.type.dtype)
    if dtype is not DType.I64:
        numbers = graph.op("Cast", [numbers], to=STORED[dtype])
    emitter.give(node, numbers)


LOWERINGS: Final[dict[str, Lowering]] = {
    "reshape": _reshape,
    "transpose": _transpose,
    "expand": _expand,
    "slice": _slice,
    "concat": _concat,
    "full": _full,
    "iota": _iota,
}
