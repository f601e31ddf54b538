"""Rotary positions, the KV cache and attention over it."""

from __future__ import annotations

from dataclasses import dataclass

from ....ir.errors import ProgramError
from ....ir.ops.state import cache_of
from ....ir.program import Node
from ....ir.resources import KvGroup
from ....ir.types import DType
from ..buffers import CTYPES
from ..calls import Arg, Code, Const, Span, applied, c_dim
from ..emitter import Emitter, Lowering, Rows, pointer
from ..expressions import literal


def _group(e: Emitter, node: Node) -> tuple[int, KvGroup, int]:
    """The node's KV group: its index, itself, and the place in it of the cache it names."""
    name, cache = node.attrs["group"], cache_of(node.attrs)
    for index, group in enumerate(e.program.resources):
        if group.name == name and isinstance(group, KvGroup) and cache in group.layers:
            return index, group, group.layers.index(cache)
    raise ProgramError(f"no KV group {name!r} has a cache of layer {cache}", where=node.source)


@dataclass(frozen=True, slots=True)
class _Cache:
    """The KV cache that a node names."""

    view: Code
    """C++ of its KvView."""
    group: Const
    """The index of its KV group."""
    span: Span
    ctype: str


def _cache(e: Emitter, node: Node) -> _Cache:
    index, group, place = _group(e, node)
    layer_bytes = group.bytes_per_block() // len(group.layers)
    view = applied(
        "kv_view",
        *(("m.kv[", Const(index), "]"), group.bytes_per_block(), Const(place * layer_bytes)),
        *(group.block_size, group.num_kv_heads, group.key_head_dim, group.value_head_dim),
    )
    span = Span(f"kv:{index}:{place}")
    return _Cache(view, Const(index), span, CTYPES[DType(group.dtype)])


def lower_rotary(e: Emitter, node: Node) -> None:
    """`rotary(positions, frequencies)`: the angles of a step's tokens, once for all layers."""
    positions, frequencies = (e.dense(e.buffer(operand)) for operand in node.inputs)
    out = e.output(node.output)
    tokens, width = (c_dim(dim) for dim in out.shape)
    scale = node.attrs["scale"]
    assert isinstance(scale, float)
    e.call(
        f"rotary_{node.attrs['function']}",
        (pointer(positions), pointer(frequencies), literal(scale), pointer(out), tokens, width),
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
        "rope",
        (
            *(x.pointer, x.stride, pointer(out), heads * dim, pointer(cos), pointer(sin)),
            *(_rotary_dim(node), _style(node), heads, dim, x.count),
        ),
        reads=(x.buffer, cos, sin),
        writes=(out,),
        comment=node.op,
    )


def lower_kv_write(e: Emitter, node: Node) -> None:
    """`kv_write(k, v)`."""
    k, v = e.rows(node.inputs[0], inner_dims=2), e.rows(node.inputs[1], inner_dims=2)
    cache = _cache(e, node)
    slots = ("s.groups[", cache.group, "].slots")
    e.call(
        f"kv_write<{k.buffer.ctype}, {cache.ctype}>",
        (k.pointer, k.stride, v.pointer, v.stride, slots, k.count, cache.view),
        reads=(k.buffer, v.buffer),
        writes=(cache.span,),
        comment=node.op,
    )


def lower_rope_kv_write(e: Emitter, node: Node) -> None:
    """`rope_kv_write(q, k, v, cos, sin)` → rotated q; k and v go to the cache."""
    q, k, v = (e.rows(operand, inner_dims=2) for operand in node.inputs[:3])
    cos, sin = (e.dense(e.buffer(operand)) for operand in node.inputs[3:])
    out = e.output(node.output)
    heads, dim = _heads(out.shape)
    cache = _cache(e, node)
    slots = ("s.groups[", cache.group, "].slots")
    e.call(
        e.apart("rope_kv_write", out.ctype, cache.ctype, cos.ctype),
        (
            *(q.pointer, q.stride, pointer(out), heads * dim),
            *(k.pointer, k.stride, v.pointer, v.stride),
            *(pointer(cos), pointer(sin), _rotary_dim(node), _style(node), heads),
            *(cache.view, slots, q.count),
        ),
        reads=(q.buffer, k.buffer, v.buffer, cos, sin),
        writes=(out, cache.span),
        comment=node.op,
    )


def lower_paged_attention(e: Emitter, node: Node) -> None:
    """`paged_attention(q, sinks?)`: each row against its sequence's cache."""
    q: Rows = e.rows(node.inputs[0], inner_dims=2)
    out = e.output(node.output)
    heads, value_dim = _heads(out.shape)
    sinks = [e.dense(e.buffer(operand)) for operand in node.inputs[1:]]
    sink_type = sinks[0].ctype if sinks else out.ctype
    address: Arg = pointer(sinks[0]) if sinks else "nullptr"
    cache = _cache(e, node)
    softcap = node.attrs.get("softcap") or 0.0
    e.call(
        e.apart("paged_attention", out.ctype, cache.ctype, sink_type),
        (
            *(q.pointer, q.stride, pointer(out), heads * value_dim),
            *(applied("step_view", "s", cache.group), cache.view, heads),
            *(f"{node.attrs['scale']!r}f", Const(_window(node)), f"{softcap!r}f", address),
        ),
        reads=(q.buffer, cache.span, *sinks),
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


def _rotary_dim(node: Node) -> int:
    dim = node.attrs["rotary_dim"]
    assert isinstance(dim, int)
    return dim


def _style(node: Node) -> str:
    return f"RopeStyle::{node.attrs.get('style', 'half')}"


LOWERINGS: dict[str, Lowering] = {
    "rotary": lower_rotary,
    "rope": lower_rope,
    "kv_write": lower_kv_write,
    "rope_kv_write": lower_rope_kv_write,
    "paged_attention": lower_paged_attention,
}
