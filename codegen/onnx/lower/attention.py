"""Writing keys and values, and attending to what is stored."""

from __future__ import annotations

from typing import Final

from ....ir.ops.base import int_attr
from ....ir.program import Node, Operand
from ..caches import CacheForm
from ..emitter import Emitter, Lowering
from .position import turned


def lowerings(form: CacheForm) -> dict[str, Lowering]:
    """Those of the ops on paged state, for one form of caches."""

    def flat(emitter: Emitter, operand: Operand, name: str | None = None) -> str:
        """Heads of each token as one row."""
        width = emitter.fixed(operand, 1) * emitter.fixed(operand, 2)
        return emitter.graph.reshape(name or emitter.operand(operand), [-1, width])

    def kv_write(emitter: Emitter, node: Node) -> None:
        k, v = node.inputs
        form.write(node, flat(emitter, k), flat(emitter, v))

    def rope_kv_write(emitter: Emitter, node: Node) -> None:
        q, k, v, cos, sin = node.inputs
        rows = turned(emitter, node, q, cos, sin)
        shape = [-1, emitter.fixed(q, 1), emitter.fixed(q, 2)]
        keys = flat(emitter, k, turned(emitter, node, k, cos, sin))
        form.write(node, keys, flat(emitter, v))
        emitter.give(node, emitter.graph.reshape(rows, shape))

    def paged_attention(emitter: Emitter, node: Node) -> None:
        q, *sinks = node.inputs
        sink = emitter.operand(sinks[0]) if sinks else None
        rows = form.attend(node, flat(emitter, q), sink)
        shape = [-1, emitter.fixed(q, 1), int_attr(node.attrs, "value_head_dim")]
        emitter.give(node, emitter.graph.reshape(rows, shape))

    return {
        "kv_write": kv_write,
        "rope_kv_write": rope_kv_write,
        "paged_attention": paged_attention,
    }


OPS: Final = frozenset({"kv_write", "rope_kv_write", "paged_attention"})
