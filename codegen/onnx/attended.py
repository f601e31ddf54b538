"""Attention over padded rows: ONNX's op, or plain ops where it cannot say what a layer does."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.ops.base import int_attr
from ...ir.program import Node
from ...ir.resources import KvGroup
from ...ir.types import DType
from .emitter import Emitter
from .graph import Graph


@dataclass(frozen=True, slots=True)
class Heads:
    """How many heads there are, their sizes, and what is done to their scores."""

    queries: int
    keys: int
    key_size: int
    value_size: int
    scale: float
    softcap: float | None

    @classmethod
    def of(cls, emitter: Emitter, node: Node, group: KvGroup) -> Heads:
        """Those of a `paged_attention`."""
        scale, softcap = node.attrs["scale"], node.attrs["softcap"]
        assert isinstance(scale, (int, float))
        return cls(
            queries=emitter.fixed(node.inputs[0], 1),
            keys=group.num_kv_heads,
            key_size=group.key_head_dim,
            value_size=int_attr(node.attrs, "value_head_dim"),
            scale=float(scale),
            softcap=float(softcap) if isinstance(softcap, (int, float)) else None,
        )


def attended(
    graph: Graph, heads: Heads, q: str, k: str, v: str, mask: str, sinks: str | None
) -> str:
    """q `[B, Q, H * D]`, k `[B, K, G * D]`, v `[B, K, G * Dv]` -> `[B, Q, H * Dv]`.

    `mask` `[B, 1, Q, K]` says which keys a query sees. With `sinks` `[H]`, each head has one more
    score without a value, which the op Attention does not know.
    """
    if sinks is not None:
        return _of_plain_ops(graph, heads, q, k, v, mask, sinks)
    return graph.op(
        "Attention",
        [q, k, v, mask],
        scale=heads.scale,
        softcap=heads.softcap,
        q_num_heads=heads.queries,
        kv_num_heads=heads.keys,
    )


def of_heads(graph: Graph, heads: Heads, q: str, k: str, v: str, mask: str) -> str:
    """The same of heads `[B, heads, Q or K, D]`."""
    return graph.op("Attention", [q, k, v, mask], scale=heads.scale, softcap=heads.softcap)


def _of_plain_ops(graph: Graph, heads: Heads, q: str, k: str, v: str, mask: str, sinks: str) -> str:
    shared = heads.queries // heads.keys

    def number(value: float) -> str:
        return graph.const(value, DType.F32)

    queries = graph.op("Mul", [q, number(heads.scale)])
    queries = graph.reshape(queries, [0, 0, heads.keys, shared, heads.key_size])
    queries = graph.op("Transpose", [queries], perm=[0, 2, 3, 1, 4])  # [B, G, H/G, Q, D]
    keys = graph.reshape(k, [0, 0, heads.keys, 1, heads.key_size])
    keys = graph.op("Transpose", [keys], perm=[0, 2, 3, 4, 1])  # [B, G, 1, D, K]
    scores = graph.op("MatMul", [queries, keys])  # [B, G, H/G, Q, K]
    if heads.softcap is not None:
        scores = graph.op("Div", [scores, number(heads.softcap)])
        scores = graph.op("Mul", [graph.op("Tanh", [scores]), number(heads.softcap)])
    seen = graph.op("Unsqueeze", [mask, graph.const([1])])  # [B, 1, 1, Q, K]
    scores = graph.op("Where", [seen, scores, number(float("-inf"))])
    sink = graph.reshape(sinks, [1, heads.keys, shared, 1, 1])
    # A column of the sinks, as long as the queries: zero times a score would be NaN of infinity.
    rows = graph.op("Shape", [q], start=0, end=2)
    first = graph.op("Slice", [rows, graph.const([0]), graph.const([1])])
    last = graph.op("Slice", [rows, graph.const([1]), graph.const([2])])
    middle = graph.const([heads.keys, shared])
    shape = graph.op("Concat", [first, middle, last, graph.const([1])], axis=0)
    scores = graph.op("Concat", [scores, graph.op("Expand", [sink, shape])], axis=-1)
    weights = graph.op("Softmax", [scores], axis=-1)
    ends = graph.const([0]), graph.const([-1]), graph.const([4])
    weights = graph.op("Slice", [weights, *ends])
    values = graph.reshape(v, [0, 0, heads.keys, 1, heads.value_size])
    values = graph.op("Transpose", [values], perm=[0, 2, 3, 1, 4])  # [B, G, 1, K, Dv]
    result = graph.op("MatMul", [weights, values])  # [B, G, H/G, Q, Dv]
    result = graph.op("Transpose", [result], perm=[0, 3, 1, 2, 4])
    return graph.reshape(result, [0, 0, heads.queries * heads.value_size])
