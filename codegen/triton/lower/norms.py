"""Norms over rows, alone and with the residual addition in front of them."""

from __future__ import annotations

from ....ir.program import Node
from ..buffers import Buffer, times
from ..calls import Constant, Tuning
from ..emitter import Emitter, Lowering, power_of_two


def lower_rms_norm(e: Emitter, node: Node) -> None:
    """`rms_norm(x, w)`; `x` may be strided rows, such as heads in a merged projection."""
    _norm(e, node, None, rms=True)


def lower_add_rms_norm(e: Emitter, node: Node) -> None:
    """`add_rms_norm(x, residual, w)` → normed rows and the sum that travels on."""
    _norm(e, node, e.dense(e.buffer(node.inputs[1])), rms=True)


def lower_layer_norm(e: Emitter, node: Node) -> None:
    """`layer_norm(x, w, b?)`."""
    _norm(e, node, None, rms=False)


def lower_add_layer_norm(e: Emitter, node: Node) -> None:
    """`add_layer_norm(x, residual, w, b?)` → normed rows and the sum that travels on."""
    _norm(e, node, e.dense(e.buffer(node.inputs[1])), rms=False)


def _norm(e: Emitter, node: Node, residual: Buffer | None, *, rms: bool) -> None:
    x = e.nested_rows(node.inputs[0])
    rest = node.inputs[1:] if residual is None else node.inputs[2:]
    w, *bias = (e.dense(e.buffer(operand)) for operand in rest)
    out = e.output(node.outputs[0])
    total = out if residual is None else e.output(node.outputs[1])
    eps = node.attrs["eps"]
    assert isinstance(eps, float)
    passed = {"x": x.buffer, "residual": x.buffer if residual is None else residual, "w": w}
    if not rms:
        passed["b"] = bias[0] if bias else w
    block = power_of_two(x.length)
    constants: dict[str, Constant] = {
        "INNER": x.inner,
        "OUTER_STRIDE": x.outer_stride,
        "INNER_STRIDE": x.inner_stride,
        "WIDTH": x.length,
        "BLOCK": block,
        "ADD": residual is not None,
    }
    if rms:
        constants["EARLY"] = bool(node.attrs["round_before_scale"])
    else:
        constants["BIAS"] = bool(bias)
    e.launch(
        "norms.rms_norm" if rms else "norms.layer_norm",
        [times(x.count, x.inner)],
        {**passed, "out": out, "total": total, "eps": eps},
        constants,
        row_tuning(block),
    )


def lower_softmax(e: Emitter, node: Node) -> None:
    """`softmax(x)` over the last dimension."""
    x = e.rows(node.inputs[0])
    out = e.output(node.output)
    block = power_of_two(x.length)
    e.launch(
        "norms.softmax",
        [x.count],
        {"x": x.typed, "out": out},
        {"STRIDE": x.stride, "WIDTH": x.length, "BLOCK": block},
        row_tuning(block),
    )


def row_tuning(block: int) -> Tuning:
    """Warps for a block that holds a row: about 8 elements a thread, at most 16 warps."""
    return Tuning(min(16, max(1, block // 256)))


LOWERINGS: dict[str, Lowering] = {
    "rms_norm": lower_rms_norm,
    "add_rms_norm": lower_add_rms_norm,
    "layer_norm": lower_layer_norm,
    "add_layer_norm": lower_add_layer_norm,
    "softmax": lower_softmax,
}
