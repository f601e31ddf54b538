"""Reductions over a row, and the norms that ATen has whole."""

from __future__ import annotations

import torch
from torch import fx

from ...ir.errors import UnsupportedModelError
from ...ir.program import Operand, WeightRef
from ...ir.torch_types import to_torch
from ...ir.types import DType, TensorType
from .base import Context, Converter, Result, axis_of, plain_argument


def _reduce(op: str) -> Converter:
    def convert(ctx: Context, node: fx.Node) -> Result:
        x = ctx.cast(ctx.tensor(node.args[0]), ctx.out_type(node).dtype)
        rank = ctx.type_of(x).rank
        dims = plain_argument(node, 1, "dim")
        dims = [dims] if isinstance(dims, int) else dims or range(rank)
        axes = tuple(axis_of(dim, rank) for dim in dims)
        keepdim = plain_argument(node, 2, "keepdim", False)
        return ctx.emit(op, x, dims=axes, keepdim=bool(keepdim))

    return convert


def _reduce_all(op: str) -> Converter:
    def convert(ctx: Context, node: fx.Node) -> Result:
        x = ctx.cast(ctx.tensor(node.args[0]), ctx.out_type(node).dtype)
        axes = tuple(range(ctx.type_of(x).rank))
        return ctx.emit(op, x, dims=axes, keepdim=False)

    return convert


def _max_dim(ctx: Context, node: fx.Node) -> Result:
    """Values alone, or with their places, which topk has."""
    x = ctx.tensor(node.args[0])
    rank = ctx.type_of(x).rank
    dim = axis_of(plain_argument(node, 1, "dim"), rank)
    keepdim = plain_argument(node, 2, "keepdim", False)
    if not any(user.args[1] == 1 for user in node.users):
        return (ctx.emit("amax", x, dims=(dim,), keepdim=bool(keepdim)), None)
    if dim != rank - 1:
        raise UnsupportedModelError("places of largest elements are found in the last dimension")
    pair = ctx.builder.add("topk", (x,), {"k": 1}).outputs
    shapes = [ctx.type_of_fake(fake).shape for fake in node.meta["val"]]
    return tuple(ctx.reshape(value, shape) for value, shape in zip(pair, shapes, strict=True))


def _softmax(ctx: Context, node: fx.Node) -> Result:
    x = ctx.cast(ctx.tensor(node.args[0]), ctx.out_type(node).dtype)
    dim = axis_of(plain_argument(node, 1, "dim"), ctx.type_of(x).rank)
    return ctx.emit("softmax", x, dim=dim)


def _cumsum(ctx: Context, node: fx.Node) -> Result:
    x = ctx.cast(ctx.tensor(node.args[0]), ctx.out_type(node).dtype)
    dim = axis_of(plain_argument(node, 1, "dim"), ctx.type_of(x).rank)
    return ctx.emit("cumsum", x, dim=dim)


def _topk(ctx: Context, node: fx.Node) -> Result:
    x = ctx.tensor(node.args[0])
    rank = ctx.type_of(x).rank
    dim = axis_of(plain_argument(node, 2, "dim", -1), rank)
    if dim != rank - 1 or not plain_argument(node, 3, "largest", True):
        raise UnsupportedModelError("topk is supported over the last dimension, largest first")
    return ctx.builder.add("topk", (x,), {"k": plain_argument(node, 1, "k")}).outputs


def _layer_norm(ctx: Context, node: fx.Node) -> Result:
    shape = plain_argument(node, 1, "normalized_shape")
    if len(shape) != 1:
        raise UnsupportedModelError("a layer norm over several dimensions is not supported")
    x = ctx.tensor(node.args[0])
    weight, bias = (node.args[i] if len(node.args) > i else None for i in (2, 3))
    eps = plain_argument(node, 4, "eps", 1e-5)
    if weight is None:
        return ctx.emit("layer_norm", x, _ones(ctx, shape[0], ctx.type_of(x).dtype), eps=eps)
    operands: list[Operand] = [x, ctx.tensor(weight)]
    if bias is not None:
        operands.append(ctx.tensor(bias))
    return ctx.emit("layer_norm", *operands, eps=eps)


def _ones(ctx: Context, size: int, dtype: DType) -> WeightRef:
    """The weight of a norm that has none: kernels and fusions know norms with a weight."""
    ones = torch.ones(size, dtype=to_torch(dtype))
    return ctx.parameters.hold(f"ones.{size}.{dtype.value}", ones, TensorType(dtype, (size,)))


CONVERTERS: dict[str, Converter] = {
    "mean.dim": _reduce("mean"),
    "sum.dim_IntList": _reduce("sum"),
    "amax.default": _reduce("amax"),
    "mean.default": _reduce_all("mean"),
    "sum.default": _reduce_all("sum"),
    "max.dim": _max_dim,
    "softmax.int": _softmax,
    "cumsum.default": _cumsum,
    "topk.default": _topk,
    "layer_norm.default": _layer_norm,
}
