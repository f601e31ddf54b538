"""Gives every value a place in one arena, shared by those that never live at the same time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from ..ir.ops import Kind, get_op
from ..ir.program import Node, Program, Value
from .base import Pass, PassContext, PassResult, finish

ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class PlanMemory(Pass):
    """`%0 = linear(..) : f32[T, 64]` => the same, with `("0", 4096)` in `attr offsets`.

    Requires: kv-lowered; the order of nodes is final.
    Ensures: memory-planned: `arena_bytes`, and in `offsets` a byte offset for each value that has
    storage of its own (a view lies in what it views). Values that live at the same time at the
    greatest sizes never overlap.
    Keeps: every bit. Why: no allocation in a step, and the working set stays in cache.
    """

    name: ClassVar[str] = "plan-memory"
    phase: ClassVar[str] = "plan"
    requires: ClassVar[frozenset[str]] = frozenset({"kv-lowered"})
    ensures: ClassVar[frozenset[str]] = frozenset({"memory-planned"})

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Place every value; a match is a value with a place."""
        places = place(lifetimes(program))
        offsets = tuple(sorted((life.name, offset) for life, offset in places))
        total = max((offset + life.num_bytes for life, offset in places), default=0)
        attrs = {**program.attrs, "arena_bytes": total, "offsets": offsets}
        if attrs == program.attrs:
            return PassResult(program)
        return finish(program, replace(program, attrs=attrs), max(1, len(offsets)))


@dataclass(frozen=True, slots=True)
class Lifetime:
    """Storage that is needed from time `born` to time `last`, both included."""

    name: str
    num_bytes: int
    born: int
    last: int

    def meets(self, other: Lifetime) -> bool:
        """Whether both are needed at some time."""
        return self.born <= other.last and other.born <= self.last


def lifetimes(program: Program) -> list[Lifetime]:
    """When each value's storage is needed. Nodes of one loop group run at the same time."""
    bounds = {name: limits.high for name, limits in program.symbols.items()}
    times = _times(program)
    owner: dict[str, str] = {}
    born: dict[str, tuple[Value, int]] = {}
    last: dict[str, int] = {}
    for node, time in zip(program.nodes, times, strict=True):
        for value in node.values():
            root = owner.get(value.name)
            if root is not None:
                last[root] = max(last[root], time)
        if _is_view(node):
            source = node.values()
            if source and source[0].name in owner:
                owner[node.output.name] = owner[source[0].name]
            continue
        for value in node.outputs:
            owner[value.name] = value.name
            born[value.name] = (value, time)
            last[value.name] = time
    for value in program.outputs:
        if value.name in owner:
            last[owner[value.name]] = len(program.nodes)
    return [
        Lifetime(name, _aligned(value.type.num_bytes(bounds)), time, last[name])
        for name, (value, time) in born.items()
    ]


def place(values: Iterable[Lifetime]) -> list[tuple[Lifetime, int]]:
    """Offsets by the greedy rule: the largest first, each at the lowest gap that is free."""
    placed: list[tuple[Lifetime, int]] = []
    for life in sorted(values, key=lambda v: (-v.num_bytes, v.born, v.name)):
        taken = sorted(
            (offset, offset + other.num_bytes) for other, offset in placed if other.meets(life)
        )
        offset = 0
        for start, stop in taken:
            if start - offset >= life.num_bytes:
                break
            offset = max(offset, stop)
        placed.append((life, offset))
    return placed


def _times(program: Program) -> list[int]:
    """A time for each node: its index, or for a loop group that of its last node.

    A group reads all it needs and writes all it makes while it runs, so that nothing it reads
    may die, and nothing it writes may be in use, anywhere between its first and last node.
    """
    index = {node.outputs[0].name: i for i, node in enumerate(program.nodes) if node.outputs}
    times = list(range(len(program.nodes)))
    groups = program.attrs.get("loops") or ()
    assert isinstance(groups, tuple), "loops is a tuple of groups"
    for group in groups:
        assert isinstance(group, tuple), "a group is a tuple of names"
        members = [index[str(name)] for name in group]
        for member in members:
            times[member] = max(members)
    return times


def _is_view(node: Node) -> bool:
    return get_op(node.op).kind is Kind.VIEW and node.op != "concat"


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
