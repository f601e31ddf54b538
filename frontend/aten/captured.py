"""The ops of our own that capture puts into the graph: attention and routed experts."""

from __future__ import annotations

from typing import Any

from torch import fx

from ...ir.errors import UnsupportedModelError
from ...ir.program import Operand, Value, WeightRef
from ..parameters import Arrangement
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
    x, index, weight, gate_up, down, *biases = (
        ctx.tensor(arg) for arg in node.args[:7] if arg is not None
    )
    act, alpha, limit, shift, transposed, interleaved = node.args[7:13]
    operands = [x, index, weight]
    operands.append(_arranged(ctx, gate_up, transposed=transposed, interleaved=interleaved))
    operands.append(_arranged(ctx, down, transposed=transposed, interleaved=False))
    if biases:
        operands.append(_arranged(ctx, biases[0], transposed=False, interleaved=interleaved))
        operands.append(biases[1])
    return ctx.emit("moe", *operands, act=act, alpha=alpha, limit=limit, shift=shift)


def _arranged(
    ctx: Context, ref: Value | WeightRef, *, transposed: Any, interleaved: Any
) -> Value | WeightRef:
    """A matrix `[E, N, K]` or bias `[E, N]` of experts, its gate rows before its up rows."""
    if not (transposed or interleaved):
        return ref
    if not isinstance(ref, WeightRef):
        raise UnsupportedModelError("the matrices of experts are computed, not loaded")
    shape = [int(str(dim)) for dim in ctx.type_of(ref).shape]
    steps: list[tuple[str, tuple[int, ...]]] = []
    if transposed:
        shape[1:] = shape[:0:-1]
        steps.append(("transpose", (0, 2, 1)))
    if interleaved:
        experts, rows, *rest = shape
        steps.append(("reshape", (experts, rows // 2, 2, *rest)))
        steps.append(("transpose", (0, 2, 1, *range(3, 3 + len(rest)))))
        steps.append(("reshape", tuple(shape)))
    return ctx.parameters.arranged(ref, shape, Arrangement("arranged", tuple(steps)))


CONVERTERS: dict[str, Converter] = {
    "attention.default": _attention,
    "moe.default": _moe,
}
