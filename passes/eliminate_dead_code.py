"""Removes what nothing reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.builder import remove_dead_code
from ..ir.program import Program
from .base import Pass, PassContext, PassResult, finish


@dataclass(frozen=True)
class EliminateDeadCode(Pass):
    """`%1 = cumsum(%0) {dim = 0} : f32[T]` => nothing, where %1 is never read.

    Requires: nothing. Ensures: no-dead-code (weights that nothing reads go as well).
    Keeps: every bit; nodes that touch paged state always stay.
    Why: captured programs contain unused masks and sums, which would fail the locality check.
    """

    name: ClassVar[str] = "eliminate-dead-code"
    phase: ClassVar[str] = "canonicalize"
    ensures: ClassVar[frozenset[str]] = frozenset({"no-dead-code"})

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Drop dead nodes and weights; a match is either."""
        live = remove_dead_code(program)
        gone = len(program.nodes) - len(live.nodes) + len(program.weights) - len(live.weights)
        return finish(program, live, gone)
