"""Elementwise ops."""

from __future__ import annotations

from typing import Final

from ....ir.program import Node, Operand
from ....ir.types import DType, TensorType
from ..emitter import Emitter, Lowering
from ..graph import Graph
from ..types import STORED, computed

_UNARY: Final = {
    "neg": "Neg",
    "abs": "Abs",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "reciprocal": "Reciprocal",
    "sin": "Sin",
    "cos": "Cos",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "relu": "Relu",
    "erf": "Erf",
    "softplus": "Softplus",
    "floor": "Floor",
    "logical_not": "Not",
}
_BINARY: Final = {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "pow": "Pow",
    "maximum": "Max",
    "minimum": "Min",
    "eq": "Equal",
    "lt": "Less",
    "le": "LessOrEqual",
    "gt": "Greater",
    "ge": "GreaterOrEqual",
    "logical_and": "And",
    "logical_or": "Or",
}


def joined(emitter: Emitter, operands: tuple[Operand, ...]) -> list[str]:
    """Operands that must agree: literals, and scalars of another type, follow the others."""
    kinds = [emitter.program.operand_type(operand) for operand in operands]
    tensors = [kind for kind in kinds if isinstance(kind, TensorType)]
    dtype = computed(next((kind for kind in tensors if kind.shape), tensors[0]).dtype)
    names = []
    for operand, kind in zip(operands, kinds, strict=True):
        name = emitter.operand(operand, dtype)
        if isinstance(kind, TensorType) and computed(kind.dtype) is not dtype:
            name = emitter.graph.op("Cast", [name], to=STORED[dtype])
        names.append(name)
    return names


def activate(graph: Graph, x: str, act: str) -> str:
    """The activation of that name, elementwise."""
    if act == "silu":
        return graph.op("Swish", [x], alpha=1.0)
    if act == "relu":
        return graph.op("Relu", [x])
    return graph.op("Gelu", [x], approximate="tanh" if act == "gelu_tanh" else "none")


def _unary(kind: str) -> Lowering:
    def lower(emitter: Emitter, node: Node) -> None:
        emitter.give(node, emitter.graph.op(kind, [emitter.operand(node.inputs[0])]))

    return lower


def _binary(kind: str) -> Lowering:
    def lower(emitter: Emitter, node: Node) -> None:
        emitter.give(node, emitter.graph.op(kind, joined(emitter, node.inputs)))

    return lower


def _not_equal(emitter: Emitter, node: Node) -> None:
    equal = emitter.graph.op("Equal", joined(emitter, node.inputs))
    emitter.give(node, emitter.graph.op("Not", [equal]))


def _rsqrt(emitter: Emitter, node: Node) -> None:
    root = emitter.graph.op("Sqrt", [emitter.operand(node.inputs[0])])
    emitter.give(node, emitter.graph.op("Reciprocal", [root]))


def _silu(emitter: Emitter, node: Node) -> None:
    emitter.give(node, activate(emitter.graph, emitter.operand(node.inputs[0]), "silu"))


def _gelu(emitter: Emitter, node: Node) -> None:
    x, how = emitter.operand(node.inputs[0]), node.attrs["approximate"]
    emitter.give(node, emitter.graph.op("Gelu", [x], approximate=how))


def _clamp(emitter: Emitter, node: Node) -> None:
    bounds = (node.attrs["min"], node.attrs["max"])
    edges = ["" if edge is None else emitter.graph.const(edge, DType.F32) for edge in bounds]
    emitter.give(node, emitter.graph.op("Clip", [emitter.operand(node.inputs[0]), *edges]))


def _cast(emitter: Emitter, node: Node) -> None:
    wide = computed(node.output.type.dtype)
    x = emitter.operand(node.inputs[0])
    if wide is not computed(emitter.type_of(node.inputs[0]).dtype):
        x = emitter.graph.op("Cast", [x], to=STORED[wide])
    emitter.give(node, x)


def _where(emitter: Emitter, node: Node) -> None:
    condition = emitter.operand(node.inputs[0], DType.BOOL)
    like = node.output.type.dtype
    sides = [emitter.operand(side, like) for side in node.inputs[1:]]
    emitter.give(node, emitter.graph.op("Where", [condition, *sides]))


LOWERINGS: Final[dict[str, Lowering]] = {
    **{op: _unary(kind) for op, kind in _UNARY.items()},
    **{op: _binary(kind) for op, kind in _BINARY.items()},
    "ne": _not_equal,
    "rsqrt": _rsqrt,
    "silu": _silu,
    "gelu": _gelu,
    "clamp": _clamp,
    "cast": _cast,
    "where": _where,
}
