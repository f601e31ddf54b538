"""Elementwise arithmetic, with the promotions that ATen does in silence written out as casts."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ...ir.errors import UnsupportedModelError
from ...ir.program import Operand
from ...ir.torch_types import from_torch
from ...ir.types import DType
from .base import Context, Converter, Result, argument, literal_as, plain_argument


def _unary(op: str) -> Converter:
    def convert(ctx: Context, node: fx.Node) -> Result:
        dtype = ctx.out_type(node).dtype
        return ctx.emit(op, ctx.cast(ctx.tensor(node.args[0]), dtype))

    return convert


def _binary(op: str, *, swap: bool = False) -> Converter:
    def convert(ctx: Context, node: fx.Node) -> Result:
        dtype = ctx.out_type(node).dtype
        left, right = (ctx.cast(ctx.operand(arg), dtype) for arg in node.args[:2])
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1:
            right = ctx.emit("mul", right, alpha)  # type: ignore[arg-type]
        return ctx.emit(op, right, left) if swap else ctx.emit(op, left, right)

    return convert


def _divide(ctx: Context, node: fx.Node) -> Result:
    rounding = node.kwargs.get("rounding_mode")
    result = _binary("div")(ctx, node)
    if rounding is None:
        return result
    if rounding != "floor" or not ctx.out_type(node).dtype.is_float:
        raise UnsupportedModelError(f"division with rounding {rounding} is not supported")
    return ctx.emit("floor", result)  # type: ignore[arg-type]


def _compare(op: str) -> Converter:
    def convert(ctx: Context, node: fx.Node) -> Result:
        args: list[Any] = [
            arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in node.args[:2]
        ]
        dtype = from_torch(torch.result_type(*args))
        left, right = (ctx.cast(ctx.operand(arg), dtype) for arg in node.args[:2])
        return ctx.emit(op, left, right)

    return convert


def _logical(op: str) -> Converter:
    def convert(ctx: Context, node: fx.Node) -> Result:
        operands = [ctx.operand(arg) for arg in node.args]
        if any(ctx.type_of(operand).dtype is not DType.BOOL for operand in operands):
            raise UnsupportedModelError(f"{node.target} of integers is not supported")
        return ctx.emit(op, *operands)

    return convert


def convert_cast(ctx: Context, node: fx.Node) -> Result:
    """`to` and its kin: a change of element type, or nothing."""
    operand, dtype = ctx.operand(node.args[0]), ctx.out_type(node).dtype
    if isinstance(operand, (bool, int, float)):
        return literal_as(operand, dtype)
    return ctx.cast(operand, dtype)


def _gelu(ctx: Context, node: fx.Node) -> Result:
    approximate = plain_argument(node, 1, "approximate", "none")
    return ctx.emit("gelu", ctx.tensor(node.args[0]), approximate=approximate)


def _expm1(ctx: Context, node: fx.Node) -> Result:
    """e**x - 1 as tanh(x / 2) (e**x + 1), which cancels nowhere, in float32."""
    dtype = ctx.out_type(node).dtype
    x = ctx.cast(ctx.tensor(node.args[0]), DType.F64 if dtype is DType.F64 else DType.F32)
    half = ctx.emit("tanh", ctx.emit("mul", x, 0.5))
    return ctx.cast(ctx.emit("mul", half, ctx.emit("add", ctx.emit("exp", x), 1.0)), dtype)


def _softplus(ctx: Context, node: fx.Node) -> Result:
    if plain_argument(node, 1, "beta", 1) != 1 or plain_argument(node, 2, "threshold", 20) != 20:
        raise UnsupportedModelError("softplus with a beta or threshold is not supported")
    return ctx.emit("softplus", ctx.tensor(node.args[0]))


def _square(ctx: Context, node: fx.Node) -> Result:
    x = ctx.tensor(node.args[0])
    return ctx.emit("mul", x, x)


def _clamp(ctx: Context, node: fx.Node) -> Result:
    low = plain_argument(node, 1, "min")
    high = plain_argument(node, 2, "max")
    x: Operand = ctx.tensor(node.args[0])
    dtype = ctx.out_type(node).dtype
    if dtype.is_float:
        return ctx.emit("clamp", ctx.cast(x, dtype), min=low, max=high)
    if low is not None:
        x = ctx.emit("maximum", x, low)
    return x if high is None else ctx.emit("minimum", x, high)


def _clamp_by_tensors(ctx: Context, node: fx.Node) -> Result:
    dtype = ctx.out_type(node).dtype
    x = ctx.cast(ctx.tensor(node.args[0]), dtype)
    for i, (name, op) in enumerate((("min", "maximum"), ("max", "minimum"))):
        edge = argument(node, i + 1, name)
        if edge is not None:
            x = ctx.emit(op, x, ctx.cast(ctx.operand(edge), dtype))
    return x


def _where(ctx: Context, node: fx.Node) -> Result:
    dtype = ctx.out_type(node).dtype
    condition = ctx.tensor(node.args[0])
    left, right = (ctx.cast(ctx.operand(arg), dtype) for arg in node.args[1:3])
    if isinstance(left, (bool, int, float)) and isinstance(right, (bool, int, float)):
        left = ctx.emit("full", shape=(), value=left, dtype=dtype)
    return ctx.emit("where", condition, left, right)


def _masked_fill(ctx: Context, node: fx.Node) -> Result:
    x, mask, value = (ctx.operand(arg) for arg in node.args[:3])
    return ctx.emit("where", mask, ctx.cast(value, ctx.out_type(node).dtype), x)


def _nothing(ctx: Context, node: fx.Node) -> Result:
    return ctx.operand(node.args[0])


def _dropout(ctx: Context, node: fx.Node) -> Result:
    rate: Any = argument(node, 1, "p", 0.0)
    if argument(node, 2, "train", False) and rate:
        raise UnsupportedModelError(f"dropout {rate} is active")
    return ctx.operand(node.args[0])


_UNARY = [
    "neg",
    "abs",
    "exp",
    "log",
    "sqrt",
    "rsqrt",
    "reciprocal",
    "sin",
    "cos",
    "tanh",
    "sigmoid",
    "relu",
    "silu",
    "erf",
    "floor",
]
_NOTHING = [
    "contiguous.default",
    "clone.default",
    "detach.default",
    "detach_.default",
    "alias.default",
    "lift_fresh_copy.default",
    "lift_fresh.default",
]
_CASTS = [
    "to.dtype",
    "to.device",
    "to.dtype_layout",
    "to.other",
    "to.prim_Device",
    "_to_copy.default",
    "type_as.default",
]
_COMPARE = ("eq", "ne", "lt", "le", "gt", "ge")

CONVERTERS: dict[str, Converter] = {
    **{f"{op}.default": _unary(op) for op in _UNARY},
    **dict.fromkeys(_NOTHING, _nothing),
    **dict.fromkeys(_CASTS, convert_cast),
    **{f"{op}.{kind}": _compare(op) for op in _COMPARE for kind in ("Tensor", "Scalar")},
    **{
        f"{op}.{kind}": _binary(op) for op in ("add", "sub", "mul") for kind in ("Tensor", "Scalar")
    },
    **{f"rsub.{kind}": _binary("sub", swap=True) for kind in ("Tensor", "Scalar")},
    **{f"pow.{kind}": _binary("pow") for kind in ("Tensor_Scalar", "Tensor_Tensor", "Scalar")},
    **{f"div.{kind}": _divide for kind in ("Tensor", "Scalar", "Tensor_mode", "Scalar_mode")},
    "maximum.default": _binary("maximum"),
    "minimum.default": _binary("minimum"),
    "max.other": _binary("maximum"),
    "min.other": _binary("minimum"),
    "logical_and.default": _logical("logical_and"),
    "logical_or.default": _logical("logical_or"),
    "logical_not.default": _logical("logical_not"),
    "bitwise_and.Tensor": _logical("logical_and"),
    "bitwise_or.Tensor": _logical("logical_or"),
    "bitwise_not.default": _logical("logical_not"),
    "__and__.Tensor": _logical("logical_and"),
    "__or__.Tensor": _logical("logical_or"),
    "gelu.default": _gelu,
    "softplus.default": _softplus,
    "expm1.default": _expm1,
    "square.default": _square,
    "clamp.default": _clamp,
    "clamp.Tensor": _clamp_by_tensors,
    "where.self": _where,
    "where.ScalarOther": _where,
    "where.ScalarSelf": _where,
    "where.Scalar": _where,
    "masked_fill.Scalar": _masked_fill,
    "masked_fill.Tensor": _masked_fill,
    "dropout.default": _dropout,
}
