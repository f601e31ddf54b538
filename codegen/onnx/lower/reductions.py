"""Ops that combine the elements of a row."""

from __future__ import annotations

from typing import Final

from ....ir.ops.base import axes_attr
from ....ir.program import Node
from ..emitter import Emitter, Lowering, axis_of


def _reduction(kind: str) -> Lowering:
    def lower(emitter: Emitter, node: Node) -> None:
        axes = emitter.graph.const(list(axes_attr(node.attrs, "dims")))
        x, keep = emitter.operand(node.inputs[0]), int(bool(node.attrs["keepdim"]))
        emitter.give(node, emitter.graph.op(kind, [x, axes], keepdims=keep))

    return lower


def _softmax(emitter: Emitter, node: Node) -> None:
    x = emitter.operand(node.inputs[0])
    emitter.give(node, emitter.graph.op("Softmax", [x], axis=axis_of(node)))


def _cumsum(emitter: Emitter, node: Node) -> None:
    x = emitter.operand(node.inputs[0])
    emitter.give(node, emitter.graph.op("CumSum", [x, emitter.graph.const(axis_of(node))]))


def _topk(emitter: Emitter, node: Node) -> None:
    """Of equal values, ONNX takes the lower index first, as the definition does."""
    x, k = emitter.operand(node.inputs[0]), emitter.graph.const([node.attrs["k"]])
    values = emitter.graph.op("TopK", [x, k], 2, axis=-1, largest=1, sorted=1)
    emitter.give(node, values, f"{values}:1")


LOWERINGS: Final[dict[str, Lowering]] = {
    "sum": _reduction("ReduceSum"),
    "mean": _reduction("ReduceMean"),
    "amax": _reduction("ReduceMax"),
    "softmax": _softmax,
    "cumsum": _cumsum,
    "topk": _topk,
}
