"""Views: another shape or order over the same bytes; only what strides cannot say is copied."""

from __future__ import annotations

from ....ir.errors import ProgramError
from ....ir.program import Node
from ..buffers import Buffer
from ..emitter import Emitter, Lowering


def lower_reshape(e: Emitter, node: Node) -> None:
    """`reshape`."""
    source = e.buffer(node.inputs[0])
    view = source.reshape(node.output.type.shape)
    if view is None:
        view = e.dense(source).reshape(node.output.type.shape)
        assert view is not None, "a dense buffer takes any shape"
    e.buffers[node.output.name] = view


def lower_transpose(e: Emitter, node: Node) -> None:
    """`transpose`."""
    perm = node.attrs["perm"]
    assert isinstance(perm, tuple)
    order = tuple(axis for axis in perm if isinstance(axis, int))
    e.buffers[node.output.name] = e.buffer(node.inputs[0]).transpose(order)


def lower_expand(e: Emitter, node: Node) -> None:
    """`expand`."""
    e.buffers[node.output.name] = e.buffer(node.inputs[0]).expand(node.output.type.shape)


def lower_slice(e: Emitter, node: Node) -> None:
    """`slice`."""
    dim, start, step = node.attrs["dim"], node.attrs["start"], node.attrs["step"]
    assert isinstance(dim, int) and isinstance(step, int)
    if not isinstance(start, int):
        raise ProgramError(f"slice from {start!r} depends on the step", where=node.source)
    e.buffers[node.output.name] = _slice(e, node, e.buffer(node.inputs[0]), dim, start, step)


def _slice(e: Emitter, node: Node, source: Buffer, dim: int, start: int, step: int) -> Buffer:
    shape = node.output.type.shape
    view = source.slice(dim, start, step, shape)
    if view is None:
        view = e.dense(source).slice(dim, start, step, shape)
    if view is None:
        raise ProgramError("slice of a dimension with a symbolic stride", where=node.source)
    return view


def lower_concat(e: Emitter, node: Node) -> None:
    """`concat`: each part is copied to its place; symbolic dimensions lie outermost in memory,
    so that the place of a part does not depend on them."""
    dim = node.attrs["dim"]
    assert isinstance(dim, int)
    shape = node.output.type.shape
    out = e.output(node.output, sorted(range(len(shape)), key=lambda i: isinstance(shape[i], int)))
    start = 0
    for operand in node.inputs:
        part = e.buffer(operand)
        place = out.slice(dim, start, 1, part.shape)
        size = part.shape[dim]
        last = operand is node.inputs[-1]
        if place is None or (not isinstance(size, int) and not last):
            raise ProgramError(f"concat of parts of {size} elements", where=node.source)
        e.copy(part, place)
        start += size if isinstance(size, int) else 0


LOWERINGS: dict[str, Lowering] = {
    "reshape": lower_reshape,
    "transpose": lower_transpose,
    "expand": lower_expand,
    "slice": lower_slice,
    "concat": lower_concat,
}
