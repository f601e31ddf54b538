"""Where a model keeps keys and values between steps: in pages, or nowhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Final

from ...ir.ops.state import cache_of
from ...ir.program import Node
from ...ir.resources import KvGroup
from ...ir.types import DType
from .attended import Heads, attended
from .emitter import Emitter
from .types import STORED, computed

ROW_OF_PADDED: Final = "row_of_padded"
PADDED_OF_ROW: Final = "padded_of_row"


class CacheForm(ABC):
    """The inputs and outputs of the state, and how it is written and attended to.

    Tokens lie flat, `[T, ..]`, everywhere but in attention.
    """

    name: ClassVar[str]

    def __init__(self, emitter: Emitter) -> None:
        self.emitter, self.graph = emitter, emitter.graph
        resources = emitter.program.resources
        self.groups = {one.name: one for one in resources if isinstance(one, KvGroup)}
        self._masks: dict[tuple[str, int | None], str] = {}

    def group(self, node: Node) -> KvGroup:
        """The group in which a state op's keys and values lie."""
        return self.groups[str(node.attrs["group"])]

    @abstractmethod
    def declare(self) -> None:
        """Declare what a step has beside the inputs of the program."""

    @abstractmethod
    def write(self, node: Node, k: str, v: str) -> None:
        """Store keys and values `[T, G * D]` of the step's tokens."""

    @abstractmethod
    def attend(self, node: Node, q: str, sinks: str | None) -> str:
        """What queries `[T, H * D]` attend to: `[T, H * Dv]`."""

    def mask(self, group: KvGroup, window: int | None) -> str:
        """Which keys a query sees, `[B, 1, Q, K]`; equal layers share it."""
        key = group.name, window
        if key not in self._masks:
            queries, keys = self.positions(group)
            seen = self.graph.op("LessOrEqual", [keys, queries])
            if window is not None:
                first = self.graph.op("Sub", [queries, self.graph.const(window)])
                near = self.graph.op("Greater", [keys, first])
                seen = self.graph.op("And", [seen, near])
            self._masks[key] = seen
        return self._masks[key]

    @abstractmethod
    def positions(self, group: KvGroup) -> tuple[str, str]:
        """The positions of queries `[B, 1, Q, 1]` and of keys `[B, 1, 1, K]`."""


def stored_name(layer: int, part: str) -> str:
    """The input with what a layer stores; a part is `key` or `value`."""
    return f"kv.{layer}.{part}"


def written_name(layer: int, part: str) -> str:
    """The output with the same after the step, which is to be bound to the same memory."""
    return f"kv_out.{layer}.{part}"


class Paged(CacheForm):
    """Blocks of tokens in one pool for each cache, `[blocks * block_size, G * D]`.

    A step says for each token where it goes (`slots`), and for each sequence where its keys are
    (`key_slots`) and at which positions they stand (`key_positions`). Both are padded to the
    longest sequence with a slot that holds a key of the same sequence, at a position that no query
    sees: what lies in slots that were never written may be NaN, and zero times NaN is NaN.
    """

    name = "paged"

    def declare(self) -> None:
        graph = self.graph
        if not self.groups:
            return
        graph.input(ROW_OF_PADDED, DType.I64, ("B", "Q"))
        graph.input(PADDED_OF_ROW, DType.I64, ("T",))
        for group in self.groups.values():
            graph.input(f"slots.{group.name}", DType.I64, ("T", 1))
            for name in ("key_slots", "key_positions"):
                graph.input(f"{name}.{group.name}", DType.I64, ("B", f"K.{group.name}"))
            for layer in group.layers:
                for part, size in (("key", group.key_head_dim), ("value", group.value_head_dim)):
                    shape = (f"N.{group.name}", group.num_kv_heads * size)
                    graph.input(stored_name(layer, part), DType(group.dtype), shape)
                    graph.output(written_name(layer, part), DType(group.dtype), shape)

    def write(self, node: Node, k: str, v: str) -> None:
        group, cache = self.group(node), cache_of(node.attrs)
        for part, rows in (("key", k), ("value", v)):
            if computed(DType(group.dtype)) is not DType(group.dtype):
                rows = self.graph.op("Cast", [rows], to=STORED[DType(group.dtype)])
            # From an input of the graph straight to an output: in place where both are one buffer.
            before, behind = stored_name(cache, part), written_name(cache, part)
            self.graph.op("ScatterND", [before, f"slots.{group.name}", rows], [behind])

    def attend(self, node: Node, q: str, sinks: str | None) -> str:
        group, cache = self.group(node), cache_of(node.attrs)
        queries = self.graph.op("Gather", [q, ROW_OF_PADDED], axis=0)  # [B, Q, H * D]
        keys, values = (self._gathered(group, cache, part) for part in ("key", "value"))
        heads = Heads.of(self.emitter, node, group)
        window = node.attrs["window"]
        mask = self.mask(group, window if isinstance(window, int) else None)
        result = attended(self.graph, heads, queries, keys, values, mask, sinks)
        width = heads.queries * heads.value_size
        flat = self.graph.reshape(result, [-1, width])
        rows = self.graph.op("Gather", [flat, PADDED_OF_ROW], axis=0)
        self.graph.shaped(rows, [-1, width])
        return rows

    def positions(self, group: KvGroup) -> tuple[str, str]:
        queries = self.graph.op("Gather", ["positions", ROW_OF_PADDED], axis=0)
        queries = self.graph.op("Unsqueeze", [queries, self.graph.const([1, 3])])
        keys = f"key_positions.{group.name}"
        return queries, self.graph.op("Unsqueeze", [keys, self.graph.const([1, 2])])

    def _gathered(self, group: KvGroup, cache: int, part: str) -> str:
        """The keys or values of all sequences, `[B, K, G * D]`."""
        pool = written_name(cache, part)
        rows = self.graph.op("Gather", [pool, f"key_slots.{group.name}"], axis=0)
        return self.emitter.widened(rows, DType(group.dtype))


class WholeSequence(CacheForm):
    """No cache: the tokens of a step are one sequence from its beginning, and nothing is kept."""

    name = "none"

    def __init__(self, emitter: Emitter) -> None:
        super().__init__(emitter)
        self._rows: dict[int, tuple[str, str]] = {}

    def declare(self) -> None:
        pass

    def write(self, node: Node, k: str, v: str) -> None:
        dtype = DType(self.group(node).dtype)
        self._rows[cache_of(node.attrs)] = (
            self.graph.op("Unsqueeze", [self.emitter.rounded(k, dtype), self.graph.const([0])]),
            self.graph.op("Unsqueeze", [self.emitter.rounded(v, dtype), self.graph.const([0])]),
        )

    def attend(self, node: Node, q: str, sinks: str | None) -> str:
        group = self.group(node)
        queries = self.graph.op("Unsqueeze", [q, self.graph.const([0])])
        keys, values = self._rows[cache_of(node.attrs)]
        heads = Heads.of(self.emitter, node, group)
        window = node.attrs["window"]
        mask = self.mask(group, window if isinstance(window, int) else None)
        result = attended(self.graph, heads, queries, keys, values, mask, sinks)
        return self.graph.reshape(result, [-1, heads.queries * heads.value_size])

    def positions(self, group: KvGroup) -> tuple[str, str]:
        unsqueeze = ([0, 1, 3], [0, 1, 2])
        queries, keys = (
            self.graph.op("Unsqueeze", ["positions", self.graph.const(axes)]) for axes in unsqueeze
        )
        return queries, keys
