"""Makes blocks so long that a sequence has one of each group: a slot of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..ir.errors import UsageError
from ..ir.program import Program
from ..ir.resources import KvGroup
from .base import Pass, PassContext, PassResult, finish

_LONGEST = 1 << 16
"""Positions of a block that a manifest may have."""


@dataclass(frozen=True)
class OneBlockEach(Pass):
    """`resource full {block_size = 32, ...}` => `resource full {block_size = 1536, ...}`.

    Requires: nothing. Ensures: nothing more; a block has room for the longest context, and behind
    it for the tokens of one step, which kernels may write where a sequence has fewer.
    Keeps: every bit.
    Why: a cache that lies in one piece is read without a table, and some engines know no other.
    """

    name: ClassVar[str] = "one-block-each"
    phase: ClassVar[str] = "plan"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Lengthen the blocks of keys and values; UsageError where the context is too long."""
        steps = program.symbols["T"].high if "T" in program.symbols else 0
        longest = program.spec.max_context
        size = longest + min(steps, longest)  # no sequence has more tokens in a step
        groups = tuple(
            replace(one, block_size=max(size, one.block_size)) if isinstance(one, KvGroup) else one
            for one in program.resources
        )
        if groups == program.resources:
            return finish(program, program, 0)
        if size > _LONGEST:
            raise UsageError(
                f"a slot of {size} tokens is too long: the most is {_LONGEST}",
                where=self.name,
                hint="lower runtime.max_context, or keep keys and values in pages",
            )
        return finish(program, replace(program, resources=groups), len(groups))
