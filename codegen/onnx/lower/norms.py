"""Normalisations over the last dimension, alone or behind a residual addition."""

from __future__ import annotations

from typing import Final

from ....ir.program import Node
from ..emitter import Emitter, Lowering


def _normed(emitter: Emitter, node: Node, kind: str, x: str, first: int) -> str:
    """x normed by the weights from operand `first` on.

    Of float32, it makes no difference whether rows are rounded before they meet their weights.
    """
    weights = [emitter.operand(weight) for weight in node.inputs[first:]]
    eps = node.attrs["eps"]
    return emitter.graph.op(kind, [x, *weights], axis=-1, epsilon=eps, stash_type=1)


def _norm(kind: str) -> Lowering:
    def lower(emitter: Emitter, node: Node) -> None:
        x = emitter.operand(node.inputs[0])
        emitter.give(node, _normed(emitter, node, kind, x, 1))

    return lower


def _add_norm(kind: str) -> Lowering:
    def lower(emitter: Emitter, node: Node) -> None:
        x, residual = map(emitter.operand, node.inputs[:2])
        total = emitter.graph.op("Add", [x, residual])
        total = emitter.rounded(total, node.outputs[1].type.dtype)
        emitter.give(node, _normed(emitter, node, kind, total, 2), total)

    return lower


LOWERINGS: Final[dict[str, Lowering]] = {
    "rms_norm": _norm("RMSNormalization"),
    "layer_norm": _norm("LayerNormalization"),
    "add_rms_norm": _add_norm("RMSNormalization"),
    "add_layer_norm": _add_norm("LayerNormalization"),
}
