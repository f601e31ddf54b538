"""Rotary positions, the KV cache and attention over it."""

from __future__ import annotations

from ....ir.errors import ProgramError
from ....ir.ops.state import cache_of
from ....ir.program import Node
from ....ir.resources import KvGroup
from ....ir.types import DType
from ..buffers import CTYPES
from ..calls import Arg, Const, Span, c_dim
from ..emitter import Emitter, Lowering, Rows, pointer
from ..expressions import literal


def _group(e: Emitter, node: Node) -> tuple[int, KvGroup, int]:
    """The node's KV group: its index, itself, and the place in it of the cache it names."""
    name, cache = node.attrs["group"], cache_of(node.attrs)
    for index, group in enumerate(e.program.resources):
        if group.name == name and isinstance(group, KvGroup) and cache in group.layers:
            return index, group, group.layers.index(cache)
    raise ProgramError(f"no KV group {name!r} has a cache of layer {cache}", where=node.source)


def _view(e: Emitter, node: Node, places: tuple[int, int]) -> tuple[str, list[Arg], Span, str]:
    """C++ text of the cache's KvView, its arguments, what it touches, and its element type."""
    index, group, place = _group(e, node)
    layer_bytes = group.bytes_per_block() // len(group.layers)
    base, offset = places
    text = (
        f"kv_view(m.kv[{{{base}}}], {group.bytes_per_block()}, {{{offset}}}, "
        f"{group.block_size}, {group.num_kv_heads}, {group.key_head_dim}, {group.value_head_dim})"
    )
    args: list[Arg] = [Const(index), Const(place * layer_bytes)]
    return text, args, Span(f"kv:{index}:{place}"), CTYPES[DType(group.dtype)]


def lower_rotary(e: Emitter, node: Node) -> None:
    """`rotary(positions, frequencies)`: the angles of a step's tokens, once for all layers."""
    positions, frequencies = (e.dense(e.buffer(operand)) for operand in node.inputs)
    out = e.output(node.output)
    tokens, width = (c_dim(dim) for dim in out.shape)
    scale = node.attrs["scale"]
    assert isinstance(scale, float)
    e.call(
        f"rotary_{node.attrs['function']}(t, {{0}}, {{1}}, {literal(scale)}, "
        f"{{2}}, {tokens}, {width});",
        (pointer(positions), pointer(frequencies), pointer(out)),
        reads=(positions, frequencies),
        writes=(out,),
        comment=node.op,
    )


def lower_rope(e: Emitter, node: Node) -> None:
    """`rope(x, cos, sin)` alone."""
    x = e.rows(node.inputs[0], inner_dims=2)
    heads, dim = _heads(node.output.type.shape)
    cos, sin = (e.dense(e.buffer(operand)) for operand in node.inputs[1:])
    out = e.output(node.output)
    e.call(
        f"rope(t, {{0}}, {x.stride}, {{1}}, {heads * dim}, {{2}}, {{3}}, "
        f"{node.attrs['rotary_dim']}, {_style(node)}, {heads}, {dim}, {x.count});",
        (x.pointer, pointer(out), pointer(cos), pointer(sin)),
        reads=(x.buffer, cos, sin),
        writes=(out,),
        comment=node.op,
    )


def lower_kv_write(e: Emitter, node: Node) -> None:
    """`kv_write(k, v)`."""
    k, v = e.rows(node.inputs[0], inner_dims=2), e.rows(node.inputs[1], inner_dims=2)
    view, args, span, kv_type = _view(e, node, (2, 3))
    e.call(
        f"kv_write<{k.buffer.ctype}, {kv_type}>(t, {{0}}, {k.stride}, {{1}}, {v.stride}, "
        f"s.groups[{{2}}].slots, {k.count}, {view});",
        (k.pointer, v.pointer, *args),
        reads=(k.buffer, v.buffer),
        writes=(span,),
        comment=node.op,
    )


def lower_rope_kv_write(e: Emitter, node: Node) -> None:
    """`rope_kv_write(q, k, v, cos, sin)` → rotated q; k and v go to the cache."""
    q, k, v = (e.rows(operand, inner_dims=2) for operand in node.inputs[:3])
    cos, sin = (e.dense(e.buffer(operand)) for operand in node.inputs[3:])
    out = e.output(node.output)
    heads, dim = _heads(out.shape)
    view, args, span, kv_type = _view(e, node, (6, 7))
    e.call(
        f"rope_kv_write<{out.ctype}, {kv_type}>(t, "
        f"{{0}}, {q.stride}, {{3}}, {heads * dim}, {{1}}, {k.stride}, {{2}}, {v.stride}, "
        f"{{4}}, {{5}}, {node.attrs['rotary_dim']}, {_style(node)}, {heads}, "
        f"{view}, s.groups[{{6}}].slots, {q.count});",
        (
            *(q.pointer, k.pointer, v.pointer, pointer(out), pointer(cos), pointer(sin)),
            *args,
        ),
        reads=(q.buffer, k.buffer, v.buffer, cos, sin),
        writes=(out, span),
        comment=node.op,
    )


def lower_paged_attention(e: Emitter, node: Node) -> None:
    """`paged_attention(q, sinks?)`: each row against its sequence's cache."""
    q: Rows = e.rows(node.inputs[0], inner_dims=2)
    out = e.output(node.output)
    heads, value_dim = _heads(out.shape)
    sinks = [e.dense(e.buffer(operand)) for operand in node.inputs[1:]]
    sink_type = sinks[0].ctype if sinks else out.ctype
    address: Arg = pointer(sinks[0]) if sinks else f"(const {sink_type}*)nullptr"
    view, args, span, kv_type = _view(e, node, (3, 4))
    softcap = node.attrs.get("softcap") or 0.0
    e.call(
        f"paged_attention<{out.ctype}, {kv_type}, {sink_type}>(t, {{0}}, {q.stride}, {{1}}, "
        f"{heads * value_dim}, step_view(s, {{3}}), {view}, {heads}, "
        f"{node.attrs['scale']!r}f, {{5}}, {softcap!r}f, {{2}});",
        (q.pointer, pointer(out), address, *args, Const(_window(node))),
        reads=(q.buffer, span, *sinks),
        writes=(out,),
        comment=node.op,
    )


def _window(node: Node) -> int:
    window = node.attrs.get("window")
    return window if isinstance(window, int) else 0


def _heads(shape: tuple[object, ...]) -> tuple[int, int]:
    heads, dim = shape[-2:]
    assert isinstance(heads, int) and isinstance(dim, int)
    return heads, dim


def _style(node: Node) -> str:
    return f"RopeStyle::{node.attrs.get('style', 'half')}"


LOWERINGS: dict[str, Lowering] = {
    "rotary": lower_rotary,
    "rope": lower_rope,
    "kv_write": lower_kv_write,
    "rope_kv_write": lower_rope_kv_write,
    "paged_attention": lower_paged_attention,
}
