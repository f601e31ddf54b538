"""Pointwise ops as Triton expressions; what generated loops are filled with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from ...ir.errors import ProgramError
from ...ir.program import Attr, Node, Operand
from ...ir.types import DType

_UNARY: Final = {
    "neg": "(-{0})",
    "abs": "tl.abs({0})",
    "exp": "tl.exp({0})",
    "log": "tl.log({0})",
    "sqrt": "tl.sqrt_rn({0})",
    "rsqrt": "(1.0 / tl.sqrt_rn({0}))",
    "reciprocal": "(1.0 / {0})",
    "sin": "turned_sine({0}.to(tl.float64), 0).to(tl.float32)",
    "cos": "turned_sine({0}.to(tl.float64), 1).to(tl.float32)",
    "tanh": "tanh({0})",
    "sigmoid": "sigmoid({0})",
    "relu": "tl.where({0} < 0, 0, {0})",
    "silu": 'activate({0}, "silu")',
    "erf": "tl.erf({0})",
    "softplus": "softplus({0})",
    "floor": "tl.floor({0})",
    "logical_not": "({0} == 0)",
}
_BINARY: Final = {
    "add": "({0} + {1})",
    "sub": "({0} - {1})",
    "mul": "({0} * {1})",
    "div": "({0} / {1})",
    "pow": "power({0}, {1})",
    "eq": "({0} == {1})",
    "ne": "({0} != {1})",
    "lt": "({0} < {1})",
    "le": "({0} <= {1})",
    "gt": "({0} > {1})",
    "ge": "({0} >= {1})",
    "logical_and": "({0} & {1})",
    "logical_or": "({0} | {1})",
    # A NaN on either side wins, as in torch.
    "maximum": "tl.where(({0} > {1}) | ({0} != {0}), {0}, {1})",
    "minimum": "tl.where(({0} < {1}) | ({0} != {0}), {0}, {1})",
}
_OTHERS: Final = frozenset({"gelu", "clamp", "cast", "where"})

POINTWISE_OPS: Final = frozenset(_UNARY) | frozenset(_BINARY) | _OTHERS
"""The ops that have an expression."""

SCALARS: Final = {
    DType.F32: "tl.float32",
    DType.BF16: "tl.float32",
    DType.F16: "tl.float32",
    DType.I64: "tl.int64",
    DType.I32: "tl.int32",
    DType.BOOL: "tl.int1",
}
"""The type that an element of each type is computed in."""

ROUNDED: Final = {DType.BF16: "tl.bfloat16", DType.F16: "tl.float16"}
"""Types that are rounded to after each op, as their values would be."""


def expression(node: Node, operands: Sequence[str]) -> str:
    """The node's result from its operands' texts, before rounding to its type."""
    if node.op in _UNARY:
        return _UNARY[node.op].format(*operands)
    if node.op in _BINARY:
        return _BINARY[node.op].format(*_as_tensors(node, operands))
    if node.op == "where":
        return "tl.where({}, {}, {})".format(*operands)
    if node.op == "gelu":
        kind = "gelu_tanh" if node.attrs["approximate"] == "tanh" else "gelu"
        return f'activate({operands[0]}, "{kind}")'
    if node.op == "clamp":
        return _clamp(operands[0], node.attrs["min"], node.attrs["max"])
    if node.op == "cast":
        dtype = node.output.type.dtype
        if dtype is DType.BOOL:
            return f"({operands[0]} != 0)"
        return f"{operands[0]}.to({SCALARS[dtype]})"
    raise ProgramError(f"no expression for op {node.op!r}")


def _as_tensors(node: Node, operands: Sequence[str]) -> Sequence[str]:
    """Operands of `power`, which asks of either whether it is whole, as tensors both."""
    if node.op != "pow":
        return operands
    (like, *_) = (text for text, x in zip(operands, node.inputs, strict=True) if not _is_number(x))
    return [
        f"(tl.zeros_like({like}) + {text})" if _is_number(x) else text
        for text, x in zip(operands, node.inputs, strict=True)
    ]


def _is_number(operand: Operand) -> bool:
    return isinstance(operand, (bool, int, float))


def _clamp(x: str, low: Attr, high: Attr) -> str:
    if isinstance(low, (int, float)):
        x = f"tl.where({x} < {literal(low)}, {literal(low)}, {x})"
    if isinstance(high, (int, float)):
        x = f"tl.where({x} > {literal(high)}, {literal(high)}, {x})"
    return x


def literal(value: float, dtype: DType = DType.F32) -> str:
    """A literal operand, of the type its neighbour computes in."""
    if dtype is DType.BOOL or not dtype.is_float:
        return str(int(value))
    if math.isinf(value) or math.isnan(value):
        return f'float("{float(value)}")'
    return repr(float(value))
