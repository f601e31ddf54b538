"""Gives attention its memory: keys and values go to pages that later steps read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ..ir.builder import ProgramBuilder, remove_dead_code
from ..ir.errors import PassError, UsageError
from ..ir.interpret import describe
from ..ir.ops.base import int_attr
from ..ir.program import Attr, Node, Operand, Program, Value
from ..ir.resources import KvGroup
from ..ir.row_codes import ROW_CODES
from ..ir.shapes import spell_dim
from ..ir.types import DType
from .base import Pass, PassContext, PassResult, finish
from .cache_readers import cache_readers
from .match import adopt_name
from .near_miss import NearMiss

_Kind = tuple[int, int, int, int | None, str]


@dataclass(frozen=True)
class LowerKv(Pass):
    """`attention(rope(%q), rope(%k), %v)` => `%r = rope_kv_write(%q, %k, %v); paged_attention(%r)`.

    Requires: unit-batch-squeezed. Ensures: kv-paged (state declared in groups of equal layers).
    Keeps: reassociates within the element type of the cache: steps see what earlier ones stored.
    Why: tokens are computed once, also those whose keys and values several layers read; the
    rotation is fused into the write.
    """

    dtype: str = "auto"  # that of the spec, else that of the keys
    block_size: int = 32
    fuse_rope: bool = True

    name: ClassVar[str] = "lower-kv"
    phase: ClassVar[str] = "lower-kv"
    contract: ClassVar[str] = "reassociates"
    requires: ClassVar[frozenset[str]] = frozenset({"unit-batch-squeezed"})
    ensures: ClassVar[frozenset[str]] = frozenset({"kv-paged"})

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Lower every attention op; PassError for a layer with two, or one that is not causal.

        Layers that attend to the same two values read the cache of the first of them.
        """
        attentions = [node for node in program.nodes if node.op == "attention"]
        if not attentions:
            return finish(program, program, 0)
        self._check(attentions)
        readers = cache_readers(program)
        groups = self._groups(readers, program.spec.dtype)
        lowering = _Lowering(program, self.fuse_rope, groups, readers)
        builder = lowering.run()
        builder.resources = (*program.resources, *groups)
        builder.phase = "lowered"
        lowered = remove_dead_code(builder.build())
        return finish(program, lowered, len(attentions), tuple(lowering.misses))

    def _check(self, attentions: list[Node]) -> None:
        kinds = {kind.value for kind in DType if kind.is_float} | ROW_CODES.keys()
        if self.dtype != "auto" and self.dtype not in kinds:
            raise UsageError(f"unknown cache type {self.dtype}", where=self.name)
        if self.block_size < 1:
            raise UsageError(f"block_size is {self.block_size}", where=self.name)
        seen: set[Attr] = set()
        for node in attentions:
            if node.attrs["layer"] in seen:
                raise PassError(
                    f"layer {node.attrs['layer']} has two attention ops", where=describe(node)
                )
            if not node.attrs["causal"]:
                raise PassError("attention that is not causal", where=describe(node))
            seen.add(node.attrs["layer"])

    def _groups(self, readers: list[list[Node]], own: str | None) -> tuple[KvGroup, ...]:
        """Groups of equal caches; `own` is the type that the model's spec has for them."""
        kinds: dict[_Kind, list[int]] = {}
        for nodes in readers:
            layer = int_attr(nodes[0].attrs, "layer")
            kinds.setdefault(self._kind(nodes, own), []).append(layer)
        names: dict[str, int] = {}
        groups = []
        for (heads, key_dim, value_dim, window, dtype), layers in kinds.items():
            base = "full" if window is None else f"window{window}"
            count = names[base] = names.get(base, 0) + 1
            name = base if count == 1 else f"{base}_{count}"
            group = KvGroup(
                name, tuple(layers), heads, key_dim, value_dim, dtype, self.block_size, window
            )
            groups.append(group)
        return tuple(groups)

    def _kind(self, readers: list[Node], own: str | None) -> _Kind:
        k, v = readers[0].values()[1:3]
        sizes = (k.type.shape[1], k.type.shape[2], v.type.shape[2])
        heads, key_dim, value_dim = sizes
        windows = [node.attrs["window"] for node in readers]
        limits = [window for window in windows if isinstance(window, int)]
        window = max(limits) if len(limits) == len(windows) else None  # what any of them sees
        dtype = (own or k.type.dtype.value) if self.dtype == "auto" else self.dtype
        assert isinstance(heads, int)
        assert isinstance(key_dim, int)
        assert isinstance(value_dim, int)
        return heads, key_dim, value_dim, window, dtype


@dataclass(slots=True)
class _Lowering:
    program: Program
    fuse_rope: bool
    groups: tuple[KvGroup, ...]
    readers: list[list[Node]]
    misses: list[NearMiss] = field(default_factory=list)

    def run(self) -> ProgramBuilder:
        builder = ProgramBuilder.from_program(self.program)
        producers, consumers = self.program.producers(), self.program.consumers()
        ropes = {
            id(nodes[0]): self._ropes(nodes, producers, consumers)
            for nodes in self.readers
            if self.fuse_rope
        }
        writers = {id(node): nodes[0] for nodes in self.readers for node in nodes}
        moved = {id(rope) for pair in ropes.values() if pair for rope in pair}
        for node in self.program.nodes:
            if id(node) in moved:
                continue
            if node.op == "attention":
                self._lower(builder, node, writers[id(node)], ropes.get(id(node)))
            else:
                builder.copy(node)
        return builder

    def _ropes(
        self, readers: list[Node], producers: dict[str, Node], consumers: dict[str, list[Node]]
    ) -> tuple[Node, Node] | None:
        """The rotations of q and k, where the write can take both in."""
        node = readers[0]
        q, k, v = node.values()[:3]
        pair = producers.get(q.name), producers.get(k.name)
        if pair[0] is None or pair[1] is None or {pair[0].op, pair[1].op} != {"rope"}:
            return None
        reason = None
        if pair[0].inputs[1:] != pair[1].inputs[1:] or pair[0].attrs != pair[1].attrs:
            reason = "q and k are turned in different ways"
        elif len(consumers[q.name]) > 1 or len(consumers[k.name]) > len(readers) or k in (q, v):
            reason = "a turned value is also read elsewhere"
        if reason is not None:
            self.misses.append(NearMiss.at(node, reason))
            return None
        return pair[0], pair[1]

    def _lower(
        self, builder: ProgramBuilder, node: Node, writer: Node, ropes: tuple[Node, Node] | None
    ) -> None:
        q, k, v = node.values()[:3]
        cache = writer.attrs["layer"]
        group = next(g.name for g in self.groups if cache in g.layers)
        place: dict[str, Attr] = {"layer": node.attrs["layer"], "cache": cache, "group": group}
        if ropes is not None:
            q = self._rope_write(builder, node, ropes, v, place)
        elif node is writer:
            builder.add("kv_write", (k, v), place, layer=node.layer, source=node.source)
        sinks: tuple[Operand, ...] = node.inputs[3:]
        attrs = place | {name: node.attrs[name] for name in ("scale", "window", "softcap")}
        attrs["value_head_dim"] = spell_dim(v.type.shape[2])
        mark = len(builder.nodes)
        attended = builder.add(
            "paged_attention",
            (q, *sinks),
            attrs,
            names=(f"{node.output.name}.paged",),
            layer=node.layer,
            source=node.source,
        )
        adopt_name(builder, mark, node.output, attended.output)

    def _rope_write(
        self,
        builder: ProgramBuilder,
        node: Node,
        ropes: tuple[Node, Node],
        v: Value,
        place: dict[str, Attr],
    ) -> Value:
        rope_q, rope_k = ropes
        mark = len(builder.nodes)
        inputs = (rope_q.inputs[0], rope_k.inputs[0], v, *rope_q.inputs[1:])
        attrs = place | dict(rope_q.attrs)
        turned = builder.add(
            "rope_kv_write",
            inputs,
            attrs,
            names=(f"{rope_q.output.name}.written",),
            layer=node.layer,
            source=node.source,
        )
        adopt_name(builder, mark, rope_q.output, turned.output)
        return rope_q.output
