"""Caches in which each sequence has a slot: keys and values of a whole context in one piece."""

from __future__ import annotations

from typing import ClassVar

from ...ir.ops.state import cache_of
from ...ir.program import Node
from ...ir.resources import KvGroup
from ...ir.types import DType
from .attended import Heads, attended, of_heads
from .caches import CacheForm, stored_name, written_name
from .types import STORED, computed


class Slots(CacheForm):
    """Pools `[S, G, C, D]`: those slots of a group that a step is bound to, `C` tokens long.

    A step computes as many rows as it is bound to slots, `S`, each padded to the longest of the
    step, `Q`; rows of slots whose sequence is not in the step write behind what is stored there,
    where nothing is read. `lengths` says how many tokens a slot has after the step.
    """

    name: ClassVar[str] = "slots"

    def declare(self) -> None:
        graph = self.graph
        for group in self.groups.values():
            rows = f"S.{group.name}"
            graph.input(f"row_of_padded.{group.name}", DType.I64, (rows, "Q"))
            graph.input(f"padded_of_row.{group.name}", DType.I64, ("T",))
            graph.input(f"write_at.{group.name}", DType.I64, (rows,))
            self.declare_keys(group)
            for layer in group.layers:
                for part, size in (("key", group.key_head_dim), ("value", group.value_head_dim)):
                    shape = (rows, group.num_kv_heads, group.block_size, size)
                    graph.input(stored_name(layer, part), DType(group.dtype), shape)
                    graph.output(written_name(layer, part), DType(group.dtype), shape)

    def declare_keys(self, group: KvGroup) -> None:
        """Declare what says how many keys are read, and which of them are stored."""
        self.graph.input(f"lengths.{group.name}", DType.I64, (f"S.{group.name}",))
        self.graph.input(f"key_count.{group.name}", DType.I64, (1,))

    def write(self, node: Node, k: str, v: str) -> None:
        group, cache = self.group(node), cache_of(node.attrs)
        sizes = {"key": group.key_head_dim, "value": group.value_head_dim}
        for part, rows in (("key", k), ("value", v)):
            if computed(DType(group.dtype)) is not DType(group.dtype):
                rows = self.graph.op("Cast", [rows], to=STORED[DType(group.dtype)])
            padded = self.padded(group, rows)
            padded = self.graph.reshape(padded, [0, 0, group.num_kv_heads, sizes[part]])
            padded = self.graph.op("Transpose", [padded], perm=[0, 2, 1, 3])  # [S, G, Q, D]
            before, behind = stored_name(cache, part), written_name(cache, part)
            places = [before, padded, f"write_at.{group.name}"]
            self.graph.op("TensorScatter", places, [behind], axis=2, mode="linear")

    def attend(self, node: Node, q: str, sinks: str | None) -> str:
        group, cache = self.group(node), cache_of(node.attrs)
        heads = Heads.of(self.emitter, node, group)
        window = node.attrs["window"]
        mask = self.mask(group, window if isinstance(window, int) else None)
        queries = self.padded(group, q)
        keys, values = (self._read(group, cache, part) for part in ("key", "value"))
        if sinks is None:
            queries = self.graph.reshape(queries, [0, 0, heads.queries, heads.key_size])
            queries = self.graph.op("Transpose", [queries], perm=[0, 2, 1, 3])
            result = of_heads(self.graph, heads, queries, keys, values, mask)
            result = self.graph.op("Transpose", [result], perm=[0, 2, 1, 3])
        else:
            lines = [self.graph.op("Transpose", [x], perm=[0, 2, 1, 3]) for x in (keys, values)]
            result = attended(self.graph, heads, queries, lines[0], lines[1], mask, sinks)
        return self.flat(group, result, heads.queries * heads.value_size)

    def padded(self, group: KvGroup, rows: str) -> str:
        """Rows of tokens `[T, W]` as `[S, Q, W]`."""
        return self.graph.op("Gather", [rows, f"row_of_padded.{group.name}"], axis=0)

    def flat(self, group: KvGroup, x: str, width: int) -> str:
        """Padded rows as those of tokens, `[T, W]`."""
        rows = self.graph.reshape(x, [-1, width])
        flat = self.graph.op("Gather", [rows, f"padded_of_row.{group.name}"], axis=0)
        self.graph.shaped(flat, [-1, width])
        return flat

    def positions(self, group: KvGroup) -> tuple[str, str]:
        queries = self.padded(group, "positions")
        queries = self.graph.op("Unsqueeze", [queries, self.graph.const([1, 3])])
        keys = self.graph.op("Unsqueeze", [self._places(group), self.graph.const([0, 1, 2])])
        return queries, keys

    def _places(self, group: KvGroup) -> str:
        """The positions of the keys that are read, `[K]`."""
        graph = self.graph
        count = graph.op("Squeeze", [f"key_count.{group.name}", graph.const([0])])
        return graph.op("Range", [graph.const(0), count, graph.const(1)])

    def _read(self, group: KvGroup, cache: int, part: str) -> str:
        """The first keys or values of the slots, `[S, G, K, D]`; zero where nothing is stored."""
        graph = self.graph
        ends = [graph.const([0]), f"key_count.{group.name}", graph.const([2])]
        rows = graph.op("Slice", [written_name(cache, part), *ends])
        rows = self.emitter.widened(rows, DType(group.dtype))
        return graph.op("Where", [self._is_stored(group), rows, graph.const(0.0, DType.F32)])

    def _is_stored(self, group: KvGroup) -> str:
        """Whether a slot has a key at a position, `[S, 1, K, 1]`."""
        key = group.name, -1  # beside the masks, which are of windows
        if key not in self._masks:
            graph = self.graph
            lengths = graph.op("Unsqueeze", [f"lengths.{group.name}", graph.const([1, 2, 3])])
            places = graph.op("Unsqueeze", [self._places(group), graph.const([0, 1, 3])])
            self._masks[key] = graph.op("Less", [places, lengths])
        return self._masks[key]
