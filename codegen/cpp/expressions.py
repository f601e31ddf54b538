"""Pointwise ops as C++ expressions over scalars; what the fused loops are filled with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...ir.errors import ProgramError
from ...ir.program import Attr, Node
from ...ir.types import DType

_UNARY = {
    "neg": "-{0}",
    "abs": "abs({0})",
    "exp": "exp({0})",
    "log": "log({0})",
    "sqrt": "sqrt({0})",
    "rsqrt": "rsqrt({0})",
    "reciprocal": "(1.0f / {0})",
    "sin": "sin({0})",
    "cos": "cos({0})",
    "tanh": "tanh({0})",
    "sigmoid": "sigmoid({0})",
    "relu": "relu({0})",
    "silu": "silu({0})",
    "erf": "erf({0})",
    "softplus": "softplus({0})",
    "floor": "floor({0})",
    "logical_not": "!{0}",
}
_BINARY = {
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "mul": "({0} * {1})",
    "div": "({0} / {1})",
    "pow": "pow({0}, {1})",
    "eq": "({0} == {1})",
    "ne": "({0} != {1})",
    "lt": "({0} < {1})",
    "le": "({0} <= {1})",
    "gt": "({0} > {1})",
    "ge": "({0} >= {1})",
    "logical_and": "({0} && {1})",
    "logical_or": "({0} || {1})",
    # A NaN on either side wins, as in torch.
    "maximum": "(({0} > {1} || {0} != {0}) ? {0} : {1})",
    "minimum": "(({0} < {1} || {0} != {0}) ? {0} : {1})",
}
_OTHERS = frozenset({"gelu", "clamp", "cast", "where"})

POINTWISE_OPS = frozenset(_UNARY) | frozenset(_BINARY) | _OTHERS
"""The ops that have an expression."""

SCALARS = {
    DType.F32: "float",
    DType.BF16: "float",
    DType.I64: "int64_t",
    DType.I32: "int32_t",
    DType.BOOL: "bool",
}
"""The C++ type that an element of each type is computed in."""


def expression(node: Node, operands: Sequence[str]) -> str:
    """The node's result from its operands' texts, before rounding to its type."""
    if node.op in _UNARY:
        return _UNARY[node.op].format(*operands)
    if node.op in _BINARY:
        return _BINARY[node.op].format(*operands)
    if node.op == "where":
        return "({} ? {} : {})".format(*operands)
    if node.op == "gelu":
        kind = "gelu_tanh" if node.attrs.get("approximate") == "tanh" else "gelu"
        return f"{kind}({operands[0]})"
    if node.op == "clamp":
        return _clamp(operands[0], node.attrs.get("min"), node.attrs.get("max"))
    if node.op == "cast":
        return f"static_cast<{SCALARS[node.output.type.dtype]}>({operands[0]})"
    raise ProgramError(f"no expression for op {node.op!r}")


def _clamp(x: str, low: Attr, high: Attr) -> str:
    if isinstance(low, (int, float)):
        x = f"({x} < {literal(low)} ? {literal(low)} : {x})"
    if isinstance(high, (int, float)):
        x = f"({x} > {literal(high)} ? {literal(high)} : {x})"
    return x


def literal(value: float, dtype: DType = DType.F32) -> str:
    """A literal operand in C++, of the type its neighbour computes in."""
    if dtype is DType.BOOL:
        return "true" if value else "false"
    if not dtype.is_float:
        return f"int64_t({int(value)})"
    if math.isinf(value):
        sign = "-" if value < 0 else ""
        return f"({sign}std::numeric_limits<float>::infinity())"
    if math.isnan(value):
        return "std::numeric_limits<float>::quiet_NaN()"
    return f"({float(value)!r}f)"
