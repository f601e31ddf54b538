"""Rotary position embedding."""

from __future__ import annotations

from typing import Final

from ....ir.ops.base import int_attr
from ....ir.program import Node, Operand
from ....ir.types import DType
from ..emitter import Emitter, Lowering
from ..types import STORED


def _rotary(emitter: Emitter, node: Node) -> None:
    graph = emitter.graph
    positions, frequencies = map(emitter.operand, node.inputs)
    column = graph.op("Unsqueeze", [positions, graph.const([1])])
    column = graph.op("Cast", [column], to=STORED[DType.F32])
    angles = graph.op("Mul", [column, frequencies])
    turned = graph.op("Cos" if node.attrs["function"] == "cos" else "Sin", [angles])
    if node.attrs["scale"] != 1:
        turned = graph.op("Mul", [turned, graph.const(node.attrs["scale"], DType.F32)])
    emitter.give(node, turned)


def turned(emitter: Emitter, node: Node, x: Operand, cos: Operand, sin: Operand) -> str:
    """x `[T, H, D]` with its heads turned, as `[1, T, H * D]`: one sequence of tokens."""
    graph = emitter.graph
    heads, size = emitter.fixed(x, 1), emitter.fixed(x, 2)
    rows = graph.reshape(emitter.operand(x), [1, -1, heads * size])
    angles = [graph.op("Unsqueeze", [emitter.operand(a), graph.const([0])]) for a in (cos, sin)]
    width = int_attr(node.attrs, "rotary_dim")
    result = graph.op(
        "RotaryEmbedding",
        [rows, *angles],
        interleaved=int(node.attrs["style"] == "interleaved"),
        rotary_embedding_dim=None if width == size else width,
        num_heads=heads,
    )
    return emitter.rounded(result, emitter.type_of(x).dtype)


def _rope(emitter: Emitter, node: Node) -> None:
    x, cos, sin = node.inputs
    result = turned(emitter, node, x, cos, sin)
    shape = [-1, emitter.fixed(x, 1), emitter.fixed(x, 2)]
    emitter.give(node, emitter.graph.reshape(result, shape))


LOWERINGS: Final[dict[str, Lowering]] = {"rotary": _rotary, "rope": _rope}
