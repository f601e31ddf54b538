"""Views and copies of parts: everything that only moves elements."""

from __future__ import annotations

from torch import fx

from ...ir.errors import UnsupportedModelError
from ...ir.program import Value, WeightRef
from ...ir.shapes import spell_dim, sum_dims
from ...ir.types import Dim
from .base import Context, Converter, Result, argument, axis_of, plain_argument


def _reshape(ctx: Context, node: fx.Node) -> Result:
    return ctx.reshape(ctx.tensor(node.args[0]), ctx.out_type(node).shape)


def _permute_by(ctx: Context, x: Value | WeightRef, perm: tuple[int, ...]) -> Result:
    if perm == tuple(range(len(perm))):
        return x
    if perm == (1, 0) and isinstance(x, WeightRef):
        # So that `x @ weight.T` is a product with a stored matrix, which can be quantized.
        return ctx.parameters.transposed(x)
    return ctx.emit("transpose", x, perm=perm)


def _permute(ctx: Context, node: fx.Node) -> Result:
    x = ctx.tensor(node.args[0])
    rank = ctx.type_of(x).rank
    dims = plain_argument(node, 1, "dims")
    return _permute_by(ctx, x, tuple(axis_of(d, rank) for d in dims))


def _transpose(ctx: Context, node: fx.Node) -> Result:
    x = ctx.tensor(node.args[0])
    rank = ctx.type_of(x).rank
    perm = list(range(rank))
    a, b = (axis_of(plain_argument(node, i, f"dim{i - 1}"), rank) for i in (1, 2))
    perm[a], perm[b] = perm[b], perm[a]
    return _permute_by(ctx, x, tuple(perm))


def _reverse(ctx: Context, node: fx.Node) -> Result:
    x = ctx.tensor(node.args[0])
    return _permute_by(ctx, x, tuple(reversed(range(ctx.type_of(x).rank))))


def _expand(ctx: Context, node: fx.Node) -> Result:
    x = ctx.tensor(node.args[0])
    shape = ctx.out_type(node).shape
    return x if ctx.type_of(x).shape == shape else ctx.emit("expand", x, shape=shape)


def part(ctx: Context, x: Value | WeightRef, dim: int, start: Dim, stop: Dim) -> Value | WeightRef:
    """Elements `start` to `stop` of one dimension."""
    if start == 0 and stop == ctx.type_of(x).shape[dim]:
        return x
    return ctx.emit("slice", x, dim=dim, start=spell_dim(start), stop=spell_dim(stop), step=1)


def _slice(ctx: Context, node: fx.Node) -> Result:
    x = ctx.tensor(node.args[0])
    kind = ctx.type_of(x)
    dim = axis_of(argument(node, 1, "dim", 0), kind.rank)
    start, stop = argument(node, 2, "start"), argument(node, 3, "end")
    step = plain_argument(node, 4, "step", 1)
    if ctx.out_type(node).shape == kind.shape and step == 1:
        return x
    edges = [
        edge if isinstance(edge, int) or edge is None else ctx.dim(edge) for edge in (start, stop)
    ]
    first, last = (e if e is None or isinstance(e, int) else spell_dim(e) for e in edges)
    return ctx.emit("slice", x, dim=dim, start=first or 0, stop=last, step=step)


def _select(ctx: Context, node: fx.Node) -> Result:
    x = ctx.tensor(node.args[0])
    kind = ctx.type_of(x)
    dim = axis_of(plain_argument(node, 1, "dim"), kind.rank)
    index = plain_argument(node, 2, "index")
    size = kind.shape[dim]
    if index < 0 and isinstance(size, int):
        index += size
    if index < 0:
        raise UnsupportedModelError("indexing a symbolic dimension from its end is not supported")
    return ctx.reshape(part(ctx, x, dim, index, index + 1), ctx.out_type(node).shape)


def _split(ctx: Context, node: fx.Node) -> Result:
    x = ctx.tensor(node.args[0])
    dim = axis_of(argument(node, 2, "dim", 0), ctx.type_of(x).rank)
    parts: list[Value | WeightRef] = []
    start: Dim = 0
    for fake in node.meta["val"]:
        stop = sum_dims([start, ctx.dim(fake.shape[dim])])
        parts.append(part(ctx, x, dim, start, stop))
        start = stop
    return tuple(parts)


def _unbind(ctx: Context, node: fx.Node) -> Result:
    x = ctx.tensor(node.args[0])
    dim = axis_of(argument(node, 1, "dim", 0), ctx.type_of(x).rank)
    shapes = [ctx.type_of_fake(fake).shape for fake in node.meta["val"]]
    return tuple(ctx.reshape(part(ctx, x, dim, i, i + 1), shape) for i, shape in enumerate(shapes))


def _cat(ctx: Context, node: fx.Node) -> Result:
    out = ctx.out_type(node)
    dim = axis_of(argument(node, 1, "dim", 0), out.rank)
    parts = [ctx.cast(ctx.tensor(arg), out.dtype) for arg in node.args[0]]  # type: ignore[union-attr]
    return parts[0] if len(parts) == 1 else ctx.emit("concat", *parts, dim=dim)


def _stack(ctx: Context, node: fx.Node) -> Result:
    out = ctx.out_type(node)
    dim = axis_of(argument(node, 1, "dim", 0), out.rank)
    shape = (*out.shape[:dim], 1, *out.shape[dim + 1 :])
    parts = [ctx.reshape(ctx.tensor(arg), shape) for arg in node.args[0]]  # type: ignore[union-attr]
    return parts[0] if len(parts) == 1 else ctx.emit("concat", *parts, dim=dim)


def _repeat_interleave(ctx: Context, node: fx.Node) -> Result:
    x = ctx.tensor(node.args[0])
    kind, times = ctx.type_of(x), plain_argument(node, 1, "repeats")
    dim = plain_argument(node, 2, "dim")
    if dim is None:
        raise UnsupportedModelError("repeat_interleave over all dimensions is not supported")
    dim = axis_of(dim, kind.rank)
    before, after = kind.shape[: dim + 1], kind.shape[dim + 1 :]
    split = ctx.reshape(x, (*before, 1, *after))
    wide = ctx.emit("expand", split, shape=(*before, times, *after))
    return ctx.reshape(wide, ctx.out_type(node).shape)


_RESHAPES = [
    "view.default",
    "reshape.default",
    "_unsafe_view.default",
    "unsqueeze.default",
    "squeeze.dim",
    "squeeze.default",
    "squeeze.dims",
    "flatten.using_ints",
    "unflatten.int",
    "view_as.default",
]

CONVERTERS: dict[str, Converter] = {
    **dict.fromkeys(_RESHAPES, _reshape),
    "permute.default": _permute,
    "transpose.int": _transpose,
    "t.default": _reverse,
    "numpy_T.default": _reverse,
    "expand.default": _expand,
    "expand_as.default": _expand,
    "broadcast_to.default": _expand,
    "slice.Tensor": _slice,
    "select.int": _select,
    "split.Tensor": _split,
    "split_with_sizes.default": _split,
    "split.sizes": _split,
    "chunk.default": _split,
    "unbind.int": _unbind,
    "cat.default": _cat,
    "concat.default": _cat,
    "stack.default": _stack,
    "repeat_interleave.self_int": _repeat_interleave,
}
