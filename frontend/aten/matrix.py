"""Matrix products and look-ups."""

from __future__ import annotations

from torch import fx

from ...ir.errors import UnsupportedModelError
from ...ir.program import Value, WeightRef
from ...ir.types import Dim, DType
from .base import Context, Converter, Result, axis_of, plain_argument
from .views import part


def _linear(ctx: Context, node: fx.Node) -> Result:
    weights = [ctx.weight(arg) for arg in node.args[1:] if arg is not None]
    return ctx.emit("linear", ctx.tensor(node.args[0]), *weights)


def _addmm(ctx: Context, node: fx.Node) -> Result:
    if any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")):
        raise UnsupportedModelError("addmm with alpha or beta is not supported")
    bias, x, weight = (ctx.tensor(arg) for arg in node.args[:3])
    if isinstance(weight, WeightRef) and ctx.type_of(bias).rank == 1:
        return ctx.emit("linear", x, ctx.parameters.transposed(weight), bias)
    return ctx.emit("add", ctx.emit("matmul", x, weight), bias)


def _matmul(ctx: Context, node: fx.Node) -> Result:
    left, right = (ctx.tensor(arg) for arg in node.args[:2])
    if isinstance(right, WeightRef) and ctx.type_of(right).rank == 2:
        return ctx.emit("linear", left, ctx.parameters.transposed(right))
    return ctx.emit("matmul", left, right)


def _embedding(ctx: Context, node: fx.Node) -> Result:
    return ctx.emit("embedding", ctx.tensor(node.args[0]), ctx.tensor(node.args[1]))


def _take(ctx: Context, x: Value | WeightRef, index: Value | WeightRef, dim: int) -> Result:
    if ctx.type_of(index).dtype not in (DType.I32, DType.I64):
        raise UnsupportedModelError("indexing by a mask is not supported")
    run = _run(ctx, index, ctx.type_of(x).shape[dim])
    if run is not None:
        return part(ctx, x, dim, run.start, run.stop)
    if dim == 0 and isinstance(x, WeightRef) and ctx.type_of(x).rank == 2:
        return ctx.emit("embedding", x, index)
    return ctx.emit("take", x, index, dim=dim)


def _run(ctx: Context, index: Value | WeightRef, size: Dim) -> range | None:
    """The places that a constant index names, where they follow each other."""
    known = ctx.parameters.constant(index) if isinstance(index, WeightRef) else None
    if known is None or known.dim() != 1 or not isinstance(size, int):
        return None
    places = [int(place) % size for place in known]
    run = range(places[0], places[0] + len(places)) if places else range(0)
    return run if places and places == list(run) else None


def _index(ctx: Context, node: fx.Node) -> Result:
    indices = node.args[1]
    assert isinstance(indices, (list, tuple))
    used = [dim for dim, index in enumerate(indices) if index is not None]
    if len(used) != 1:
        raise UnsupportedModelError("indexing along several dimensions at once is not supported")
    return _take(ctx, ctx.tensor(node.args[0]), ctx.tensor(indices[used[0]]), used[0])


def _index_select(ctx: Context, node: fx.Node) -> Result:
    x = ctx.tensor(node.args[0])
    dim = plain_argument(node, 1, "dim") % ctx.type_of(x).rank
    return _take(ctx, x, ctx.tensor(node.args[2]), dim)


def _gather(ctx: Context, node: fx.Node) -> Result:
    x, index = ctx.tensor(node.args[0]), ctx.tensor(node.args[2])
    dim = axis_of(plain_argument(node, 1, "dim"), ctx.type_of(x).rank)
    return ctx.emit("gather", x, index, dim=dim)


def _scatter(ctx: Context, node: fx.Node) -> Result:
    x, index = ctx.tensor(node.args[0]), ctx.tensor(node.args[2])
    dim = axis_of(plain_argument(node, 1, "dim"), ctx.type_of(x).rank)
    value = plain_argument(node, 3, "value")
    if not ctx.type_of(x).dtype.is_float:
        raise UnsupportedModelError("scatter into integers is not supported")
    return ctx.emit("scatter", x, index, dim=dim, value=value)


CONVERTERS: dict[str, Converter] = {
    "linear.default": _linear,
    "addmm.default": _addmm,
    "matmul.default": _matmul,
    "mm.default": _matmul,
    "bmm.default": _matmul,
    "embedding.default": _embedding,
    "index.Tensor": _index,
    "index_select.default": _index_select,
    "gather.default": _gather,
    "scatter.value": _scatter,
}
