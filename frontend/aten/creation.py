"""Tensors made from nothing."""

from __future__ import annotations

from torch import fx

from ...ir.errors import UnsupportedModelError
from ...ir.shapes import spell_dim
from .base import Context, Converter, Result, literal_as, plain_argument


def _filled(ctx: Context, node: fx.Node, value: float) -> Result:
    kind = ctx.out_type(node)
    literal = literal_as(value, kind.dtype)
    if not kind.shape:
        return literal
    shape = tuple(spell_dim(dim) for dim in kind.shape)
    return ctx.emit("full", shape=shape, value=literal, dtype=kind.dtype)


def _constant(value: float) -> Converter:
    return lambda ctx, node: _filled(ctx, node, value)


def _full(ctx: Context, node: fx.Node) -> Result:
    return _filled(ctx, node, plain_argument(node, 1, "fill_value"))


def _scalar_tensor(ctx: Context, node: fx.Node) -> Result:
    return _filled(ctx, node, plain_argument(node, 0, "s"))


def _arange(ctx: Context, node: fx.Node) -> Result:
    """From 0 by 1; a start is added."""
    kind = ctx.out_type(node)
    start = 0 if node.target.__name__ == "arange.default" else plain_argument(node, 0, "start")  # type: ignore[union-attr]
    if node.target.__name__ == "arange.start_step" and plain_argument(node, 2, "step", 1) != 1:  # type: ignore[union-attr]
        raise UnsupportedModelError("arange with a step is not supported")
    counted = ctx.emit("iota", size=spell_dim(kind.shape[0]), dtype=kind.dtype)
    return counted if start == 0 else ctx.emit("add", counted, start)


CONVERTERS: dict[str, Converter] = {
    "zeros.default": _constant(0),
    "zeros_like.default": _constant(0),
    "new_zeros.default": _constant(0),
    "ones.default": _constant(1),
    "ones_like.default": _constant(1),
    "new_ones.default": _constant(1),
    "full.default": _full,
    "full_like.default": _full,
    "new_full.default": lambda ctx, node: _filled(ctx, node, plain_argument(node, 2, "fill_value")),
    "scalar_tensor.default": _scalar_tensor,
    "arange.default": _arange,
    "arange.start": _arange,
    "arange.start_step": _arange,
}
