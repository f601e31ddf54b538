"""Slots of keys and values as TensorRT attends to them: in their own type, up to the longest."""

from __future__ import annotations

from typing import ClassVar

from ...ir.ops.state import cache_of
from ...ir.program import Node
from ...ir.resources import KvGroup
from ...ir.types import DType
from ..onnx.attended import Heads
from ..onnx.caches import written_name
from ..onnx.slots import Slots
from ..onnx.types import STORED


class EngineSlots(Slots):
    """Pools `[S, G, C, D]`, of which a step reads the first `K` places.

    As for onnxruntime, but all that differs between steps is the shape of an input, so that
    profiles and CUDA graphs know it: `key_places` is 0 .. K - 1. What is stored nowhere is not
    replaced, which would stand between the update of the cache and attention: pools begin as zeros.
    """

    name: ClassVar[str] = "slots"

    def declare_keys(self, group: KvGroup) -> None:
        self.graph.input(f"key_places.{group.name}", DType.I64, (f"K.{group.name}",))

    def attend(self, node: Node, q: str, sinks: str | None) -> str:
        group, cache = self.group(node), cache_of(node.attrs)
        heads = Heads.of(self.emitter, node, group)
        window = node.attrs["window"]
        mask = self.mask(group, window if isinstance(window, int) else None)
        queries = self.padded(group, q)
        queries = self.graph.reshape(queries, [0, 0, heads.queries, heads.key_size])
        keys, values = (self._read(group, cache, part) for part in ("key", "value"))
        if sinks is None and heads.softcap is None:
            stored = STORED[DType(group.dtype)]
            queries = self.graph.op("Cast", [queries], to=stored)
            queries = self.graph.op("Transpose", [queries], perm=[0, 2, 1, 3])
            result = self.graph.op("Attention", [queries, keys, values, mask], scale=heads.scale)
            result = self.graph.op("Transpose", [result], perm=[0, 2, 1, 3])
            flat = self.flat(group, result, heads.queries * heads.value_size)
            return self.emitter.widened(flat, DType(group.dtype))
        return self.flat(
            group,
            self._of_plain_ops(heads, queries, keys, values, mask, sinks, group),
            heads.queries * heads.value_size,
        )

    def _of_plain_ops(
        self,
        heads: Heads,
        queries: str,
        keys: str,
        values: str,
        mask: str,
        sinks: str | None,
        group: KvGroup,
    ) -> str:
        """`[S, Q, H * Dv]`, with a soft-cap or sinks, which TensorRT's attention does not have.

        Products are in the type of the cache, scores and weights in float32.
        """
        graph, shared = self.graph, heads.queries // heads.keys
        dtype = DType(group.dtype)

        def number(value: float) -> str:
            return graph.const(value, DType.F32)

        rows = graph.op("Mul", [queries, number(heads.scale)])
        rows = graph.op("Cast", [rows], to=STORED[dtype])
        rows = graph.reshape(rows, [0, 0, heads.keys, shared, heads.key_size])
        rows = graph.op("Transpose", [rows], perm=[0, 2, 3, 1, 4])  # [S, G, H/G, Q, D]
        columns = graph.op("Transpose", [keys], perm=[0, 1, 3, 2])
        columns = graph.op("Unsqueeze", [columns, graph.const([2])])  # [S, G, 1, D, K]
        scores = self.emitter.widened(graph.op("MatMul", [rows, columns]), dtype)
        if heads.softcap is not None:
            scores = graph.op("Div", [scores, number(heads.softcap)])
            scores = graph.op("Mul", [graph.op("Tanh", [scores]), number(heads.softcap)])
        seen = graph.op("Unsqueeze", [mask, graph.const([1])])  # [S, 1, 1, Q, K]
        scores = graph.op("Where", [seen, scores, number(float("-inf"))])
        weights = self._weights(heads, scores, sinks)
        weights = graph.op("Cast", [weights], to=STORED[dtype])
        result = graph.op("MatMul", [weights, graph.op("Unsqueeze", [values, graph.const([2])])])
        result = self.emitter.widened(result, dtype)  # [S, G, H/G, Q, Dv]
        return graph.op("Transpose", [result], perm=[0, 3, 1, 2, 4])

    def _weights(self, heads: Heads, scores: str, sinks: str | None) -> str:
        """The softmax of scores `[S, G, H/G, Q, K]`; each head has one more score in `sinks`."""
        graph = self.graph
        if sinks is None:
            return graph.op("Softmax", [scores], axis=-1)
        shared = heads.queries // heads.keys
        sink = graph.reshape(sinks, [1, heads.keys, shared, 1, 1])
        rows = graph.op("Shape", [scores], start=0, end=4)
        shape = graph.op("Concat", [rows, graph.const([1])], axis=0)
        scores = graph.op("Concat", [scores, graph.op("Expand", [sink, shape])], axis=-1)
        weights = graph.op("Softmax", [scores], axis=-1)
        return graph.op("Slice", [weights, *map(graph.const, ([0], [-1], [4]))])

    def _places(self, group: KvGroup) -> str:
        return f"key_places.{group.name}"

    def _read(self, group: KvGroup, cache: int, part: str) -> str:
        """The first keys or values of the slots, `[S, G, K, D]`, in the type of the cache."""
        graph = self.graph
        count = graph.op("Shape", [f"key_places.{group.name}"], start=0, end=1)
        ends = [graph.const([0]), count, graph.const([2])]
        return graph.op("Slice", [written_name(cache, part), *ends])
