"""Gives every value a place in one arena, so that a step allocates nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..ir.ops import Kind, get_op
from ..ir.program import Attr, Program
from .base import Pass, PassContext, PassResult, finish
from .group_loops import loop_times

ALIGNMENT_BYTES = 64
PLANNED = "planned"
"""The fact that values have places in memory: what lets them live longer cannot come later."""


@dataclass(frozen=True)
class PlanMemory(Pass):
    """`program {...}` => `program { attr {arena_bytes = 4096, offsets = (("0", 0), ...)} ...}`.

    Requires: kv-paged. Ensures: planned (sizes at the upper bounds of all symbols).
    Keeps: every bit. Views (reshape, transpose, expand, slice) have no place of their own: they
    keep alive what they look at.
    Why: memory is reserved once at startup, and the peak is known at compile time.
    """

    alignment: int = ALIGNMENT_BYTES

    name: ClassVar[str] = "plan-memory"
    phase: ClassVar[str] = "plan"
    requires: ClassVar[frozenset[str]] = frozenset({"kv-paged"})
    ensures: ClassVar[frozenset[str]] = frozenset({PLANNED})

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Plan, and write `arena_bytes` and `offsets` into the program's attributes."""
        lives = lifetimes(program)
        offsets, total = _place(lives, self.alignment)
        planned: dict[str, Attr] = {
            "arena_bytes": total,
            "offsets": tuple((life.name, offsets[life.name]) for life in lives),
        }
        attrs = dict(program.attrs) | planned
        phase = "planned" if program.phase == "lowered" else program.phase
        if attrs == dict(program.attrs) and phase == program.phase:
            return finish(program, program, 0)
        return finish(program, replace(program, attrs=attrs, phase=phase), max(1, len(lives)))


@dataclass(frozen=True, slots=True)
class Lifetime:
    """A value that needs memory: its size, and the first and last node (by index) it must live."""

    name: str
    num_bytes: int
    first: int
    last: int


def lifetimes(program: Program) -> list[Lifetime]:
    """Every value with memory of its own, in program order.

    A value lives from the node that makes it to the last that reads it or a view of it; outputs
    of the program live to its end. Nodes of one loop group run at the same time.
    """
    times = loop_times(program)
    bounds = {name: bound.high for name, bound in program.symbols.items()}
    owner: dict[str, str] = {}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for i, node in zip(times, program.nodes, strict=True):
        for value in node.values():
            if value.name in owner:
                # Views stand between the members of a loop group, and run before it.
                last[owner[value.name]] = max(i, last[owner[value.name]])
        if is_view(node.op):
            source = node.values()
            if source:
                if source[0].name in owner:
                    owner[node.output.name] = owner[source[0].name]
                continue
        for value in node.outputs:
            owner[value.name] = value.name
            first[value.name] = last[value.name] = i
            sizes[value.name] = value.type.num_bytes(bounds)
    for value in program.outputs:
        if value.name in owner:
            last[owner[value.name]] = len(program.nodes)
    return [Lifetime(name, sizes[name], first[name], last[name]) for name in first]


def is_view(op: str) -> bool:
    """Whether an op only looks at its operand's bytes in another way."""
    return get_op(op).kind is Kind.VIEW and op != "concat"


def _place(lives: list[Lifetime], alignment: int) -> tuple[dict[str, int], int]:
    """The lowest gap that fits, in program order; equal layers get equal places that way.

    What lives through most of the program comes first: it would divide the memory of the others.
    """
    placed: list[tuple[int, int, int]] = []  # (offset, end, last node)
    offsets: dict[str, int] = {}
    total = 0
    half = max((life.last for life in lives), default=0) // 2
    for life in sorted(lives, key=lambda one: one.last - one.first <= half):
        placed = [block for block in placed if block[2] >= life.first]
        size = -(-max(life.num_bytes, 1) // alignment) * alignment
        at = 0
        for offset, end, _ in sorted(placed):
            if at + size <= offset:
                break
            at = max(at, end)
        offsets[life.name] = at
        placed.append((at, at + size, life.last))
        total = max(total, at + size)
    return offsets, total
