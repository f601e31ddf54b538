"""Norms over rows, alone and with the residual addition in front of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ....ir.program import Node, Operand
from ..buffers import Buffer, times
from ..calls import Constant, Passed, Tuning
from ..emitter import Emitter, Lowering, power_of_two


def lower_norm(e: Emitter, node: Node) -> None:
    """`rms_norm(x, w)`, `layer_norm(x, w, b?)`; with `add_`, a residual comes behind x, and the sum
    is a result too. `x` may be strided rows, such as heads in a merged projection."""
    norm_rows(e, node, [e.output(value) for value in node.outputs])


def norm_rows(e: Emitter, node: Node, outputs: Sequence[Buffer], post: Node | None = None) -> None:
    """A norm; `post` is one of what it adds to the residual, which only it reads."""
    x = e.nested_rows((post or node).inputs[0])
    adds, rms = node.op.startswith("add_"), node.op.endswith("rms_norm")
    w, *bias = (e.dense(e.buffer(operand)) for operand in weights_of_norm(node))
    block = power_of_two(x.length)
    passed: dict[str, Passed | Buffer] = {
        **{"x": x.buffer, "w": w},
        **{"residual": e.dense(e.buffer(node.inputs[1])) if adds else x.buffer},
    }
    constants: dict[str, Constant] = {
        "INNER": x.inner,
        "OUTER_STRIDE": x.outer_stride,
        "INNER_STRIDE": x.inner_stride,
        "WIDTH": x.length,
        "BLOCK": block,
        "ADD": adds,
    }
    passed |= {"out": outputs[0], "total": outputs[-1], "eps": epsilon(node)}
    if rms:
        before = post_norm(e, post, w)
        passed |= before.passed
        constants |= {"EARLY": bool(node.attrs["round_before_scale"]), "POST": before.kind}
    else:
        passed["b"] = bias[0] if bias else w
        constants["BIAS"] = bool(bias)
    order = _RMS_PARAMETERS if rms else _LAYER_PARAMETERS
    e.launch(
        "norms.rms_norm" if rms else "norms.layer_norm",
        [times(x.count, x.inner)],
        {name: passed[name] for name in order},
        constants,
        row_tuning(block),
    )


_RMS_PARAMETERS = ("x", "residual", "w", "post", "out", "total", "eps", "post_eps")
_LAYER_PARAMETERS = ("x", "residual", "w", "b", "out", "total", "eps")


@dataclass(frozen=True, slots=True)
class PostNorm:
    """What a kernel is given for a norm before the one that it is for, if there is one."""

    passed: Mapping[str, Passed | Buffer]
    kind: str


def post_norm(e: Emitter, node: Node | None, spare: Buffer) -> PostNorm:
    """Of a node; without one, `spare` is passed, which is not read."""
    if node is None:
        return PostNorm({"post": spare, "post_eps": 0.0}, "")
    kind = "early" if node.attrs["round_before_scale"] else "late"
    weight = e.dense(e.buffer(node.inputs[-1]))
    return PostNorm({"post": weight, "post_eps": epsilon(node)}, kind)


def weights_of_norm(node: Node) -> Sequence[Operand]:
    """The weight of a norm, and its bias where it has one."""
    return node.inputs[2:] if node.op.startswith("add_") else node.inputs[1:]


def epsilon(norm: Node) -> float:
    """What is added to the mean of squares."""
    eps = norm.attrs["eps"]
    assert isinstance(eps, float)
    return eps


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
    "rms_norm": lower_norm,
    "add_rms_norm": lower_norm,
    "layer_norm": lower_norm,
    "add_layer_norm": lower_norm,
    "softmax": lower_softmax,
}
