"""The ops of our own that capture puts into the graph: attention and routed experts."""

from __future__ import annotations

from torch import fx

from ...ir.program import Operand, Value, WeightRef
from .base import Context, Converter, Result


def _attention(ctx: Context, node: fx.Node) -> Result:
    """q, k, v come as `[1, T, heads, head_dim]`; the op takes one sequence."""
    q, k, v = (_one_sequence(ctx, ctx.tensor(arg)) for arg in node.args[:3])
    sinks, layer, scale, window, softcap = node.args[3:8]
    operands: list[Operand] = [q, k, v]
    if sinks is not None:
        operands.append(ctx.tensor(sinks))
    out = ctx.emit("attention", *operands, layer=layer, scale=scale, window=window, softcap=softcap)
    return ctx.reshape(out, ctx.out_type(node).shape)


def _one_sequence(ctx: Context, x: Value | WeightRef) -> Value | WeightRef:
    return ctx.reshape(x, ctx.type_of(x).shape[1:])


def _moe(ctx: Context, node: fx.Node) -> Result:
    operands = [ctx.tensor(arg) for arg in node.args[:7] if arg is not None]
    return ctx.emit("moe", *operands, act=node.args[7])


CONVERTERS: dict[str, Converter] = {
    "attention.default": _attention,
    "moe.default": _moe,
}
