"""Computes equal things once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.builder import ProgramBuilder
from ..ir.ops import get_op
from ..ir.program import Program, Value, exact_attrs, exact_key
from .base import Pass, PassContext, PassResult, finish


@dataclass(frozen=True)
class CommonSubexpressions(Pass):
    """`%1 = neg(%0); %2 = neg(%0); add(%1, %2)` => `%1 = neg(%0); add(%1, %1)`.

    Requires: nothing. Ensures: nothing that a pass relies on.
    Keeps: every bit; nodes that touch paged state are never merged.
    Why: models compute masks, casts and rotary values separately in each layer.
    """

    name: ClassVar[str] = "common-subexpressions"
    phase: ClassVar[str] = "canonicalize"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Merge every node into an earlier one with the same op, operands and attributes."""
        builder = ProgramBuilder.from_program(program)
        seen: dict[object, tuple[Value, ...]] = {}
        replaced: dict[str, Value] = {}
        matches = 0
        for node in program.nodes:
            inputs = tuple(
                exact_key(replaced.get(v.name, v) if isinstance(v, Value) else v)
                for v in node.inputs
            )
            key = (node.op, inputs, exact_attrs(node.attrs))
            first = None if get_op(node.op).effects else seen.setdefault(key, node.outputs)
            if first is None or first is node.outputs:
                builder.copy(node)
                continue
            matches += 1
            for old, new in zip(node.outputs, first, strict=True):
                replaced[old.name] = new
                builder.replace(old, new)
        return finish(program, builder.build(), matches)
