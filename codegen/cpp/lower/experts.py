"""Routed experts."""

from __future__ import annotations

from ....ir.program import Node, WeightRef
from ....ir.types import Dim, DType
from ..calls import Arg, WeightPtr
from ..emitter import Emitter, Lowering, pointer
from ..expressions import literal


def lower_moe(e: Emitter, node: Node) -> None:
    """`moe(x, index, weight, gate_up, down, gate_up_bias?, down_bias?)`: rows grouped by expert,
    summed in slot order."""
    x = e.rows(e.dense(e.buffer(node.inputs[0])))
    index, weight = (e.dense(e.buffer(operand)) for operand in node.inputs[1:3])
    gate_up, down = node.inputs[3], node.inputs[4]
    assert isinstance(gate_up, WeightRef) and isinstance(down, WeightRef)
    experts, double_inner, hidden = _sizes(e.program.weights[gate_up.name].type.shape)
    (slots,) = _sizes(index.shape[-1:])
    out = e.output(node.output)
    inner = double_inner // 2
    scratch = e.scratch(_scratch_bytes(e, slots, experts, hidden, inner))
    shape = f"MoeShape{{{{{x.count}, {experts}, {hidden}, {inner}, {slots}}}}}"
    biases = [e.dense(e.buffer(operand)) for operand in node.inputs[5:7]]
    addresses: list[Arg] = [pointer(bias) for bias in biases] or ["nullptr", "nullptr"]
    e.call(
        f"moe(t, {_gate(node)}, {{0}}, {x.stride}, {{1}}, {{2}}, "
        f"MoeWeights<{out.ctype}>{{{{{{3}}, {{4}}, {{7}}, {{8}}}}}}, {{5}}, {hidden}, "
        f"{shape}, {{6}});",
        (
            x.pointer,
            pointer(index),
            pointer(weight),
            WeightPtr("char", e.weights.packed(gate_up.name)),
            WeightPtr("char", e.weights.packed(down.name)),
            pointer(out),
            pointer(scratch),
            *addresses,
        ),
        reads=(x.buffer, index, weight, *biases),
        writes=(out, scratch),
        comment=node.op,
    )


def _gate(node: Node) -> str:
    """C++ text of what joins the halves of an expert's first product; braces are doubled."""
    act, limit = node.attrs["act"], node.attrs["limit"]
    numbers = [node.attrs["alpha"], float("inf") if limit is None else limit, node.attrs["shift"]]
    if numbers == [1.0, float("inf"), 0.0]:
        return f"PlainGate<Act::{act}>{{{{}}}}"
    texts = [literal(n, DType.F32) for n in numbers if isinstance(n, float)]
    return f"LimitedGate<Act::{act}>{{{{{', '.join(texts)}}}}}"


def _sizes(shape: tuple[Dim, ...]) -> tuple[int, ...]:
    assert all(isinstance(dim, int) for dim in shape), "experts have fixed sizes"
    return tuple(dim for dim in shape if isinstance(dim, int))


def _scratch_bytes(e: Emitter, slots: int, experts: int, hidden: int, inner: int) -> int:
    """`moe_scratch_bytes` of `moe.hpp` in float, at the most tokens that a step may have."""
    rows = e.program.symbols["T"].high * slots
    parts = (rows * hidden, rows * 2 * inner, rows * inner, rows, rows, experts + 1)
    return sum(-(-4 * part // 64) * 64 for part in parts)


LOWERINGS: dict[str, Lowering] = {"moe": lower_moe}
