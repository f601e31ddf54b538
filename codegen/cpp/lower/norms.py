"""Norms over rows, alone and with the residual addition in front of them."""

from __future__ import annotations

from ....ir.program import Node, Operand
from ..buffers import Buffer
from ..calls import Arg
from ..emitter import Emitter, Lowering, is_constant, pointer


def lower_rms_norm(e: Emitter, node: Node) -> None:
    """`rms_norm(x, w)`; `x` may be strided rows, such as heads in a merged projection."""
    x = e.nested_rows(node.inputs[0])
    w = e.dense(e.buffer(node.inputs[1]))
    out = e.output(node.output)
    e.call(
        f"rms_norm<{_round(node)}>",
        (
            *(x.pointer, x.stride, pointer(w), pointer(out), x.inner_count * x.length),
            *(x.count, x.inner_count, x.length, _eps(node)),
        ),
        reads=(x.buffer, w),
        writes=(out,),
        comment=node.op,
        rows=_own_rows(x.count, x.stride, w) if x.inner_count == 1 else "",
    )


def lower_add_rms_norm(e: Emitter, node: Node) -> None:
    """`add_rms_norm(x, residual, w)` → normed rows and the sum that travels on."""
    _add_norm(e, node, f"add_rms_norm<{_round(node)}>", biased=False)


def lower_layer_norm(e: Emitter, node: Node) -> None:
    """`layer_norm(x, w, b?)`."""
    x = e.rows(node.inputs[0])
    w = e.dense(e.buffer(node.inputs[1]))
    bias = _bias(e, node.inputs[2:])
    out = e.output(node.output)
    e.call(
        "layer_norm",
        (
            *(x.pointer, x.stride, pointer(w), _address(bias, w.ctype), pointer(out)),
            *(x.count, x.length, _eps(node)),
        ),
        reads=(x.buffer, w, *bias),
        writes=(out,),
        comment=node.op,
        rows=_own_rows(x.count, x.stride, w, *bias),
    )


def lower_add_layer_norm(e: Emitter, node: Node) -> None:
    """`add_layer_norm(x, residual, w, b?)` → normed rows and the sum that travels on."""
    _add_norm(e, node, "add_layer_norm", biased=True)


def _add_norm(e: Emitter, node: Node, kernel: str, *, biased: bool) -> None:
    x, residual = (e.dense(e.buffer(operand)) for operand in node.inputs[:2])
    w = e.dense(e.buffer(node.inputs[2]))
    bias = _bias(e, node.inputs[3:])
    rows = e.rows(x)
    normed, total = e.output(node.outputs[0]), e.output(node.outputs[1])
    added = (_address(bias, w.ctype),) if biased else ()
    e.call(
        kernel,
        (
            *(pointer(x), pointer(residual), pointer(w), *added, pointer(normed), pointer(total)),
            *(rows.count, rows.length, _eps(node)),
        ),
        reads=(x, residual, w, *bias),
        writes=(normed, total),
        comment=node.op,
        rows=_own_rows(rows.count, rows.stride, w, *bias),
    )


def _own_rows(count: str, stride: str, *shared: Buffer) -> str:
    """`Call.rows`: nothing where rows lie on each other, or all threads read what a call wrote."""
    return count if stride != "0" and all(map(is_constant, shared)) else ""


def _bias(e: Emitter, rest: tuple[Operand, ...]) -> list[Buffer]:
    return [e.dense(e.buffer(operand)) for operand in rest]


def _address(bias: list[Buffer], ctype: str) -> Arg:
    return pointer(bias[0]) if bias else f"(const {ctype}*)nullptr"


def _round(node: Node) -> str:
    return "true" if node.attrs.get("round_before_scale", True) else "false"


def _eps(node: Node) -> str:
    return f"{node.attrs['eps']!r}f"


LOWERINGS: dict[str, Lowering] = {
    "rms_norm": lower_rms_norm,
    "add_rms_norm": lower_add_rms_norm,
    "layer_norm": lower_layer_norm,
    "add_layer_norm": lower_add_layer_norm,
}
