"""Makes blocks so long that a sequence has one of each group: a slot of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ..ir.errors import UsageError
from ..ir.program import Program
from ..ir.resources import KvGroup, Resource, element_type
from ..ir.sizes import format_size
from ..ir.slots import slot_tokens
from ..ir.types import DType
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

    With `most_bytes`, blocks stay as they are where those of all sequences would take more, or be
    too long; with `plain`, where keys and values are not float32 and of one size. With
    `align_bytes`, keys of a layer in a block take a multiple of so many bytes, and values too.
    """

    most_bytes: int | None = None
    plain: bool = False
    align_bytes: int = 1

    name: ClassVar[str] = "one-block-each"
    phase: ClassVar[str] = "plan"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Lengthen the blocks of keys and values; UsageError where the context is too long."""
        least = slot_tokens(program)
        groups = tuple(
            replace(one, block_size=self._aligned(one, max(least, one.block_size)))
            if isinstance(one, KvGroup)
            else one
            for one in program.resources
        )
        if groups == program.resources:
            return finish(program, program, 0)
        size = max(one.block_size for one in groups if isinstance(one, KvGroup))
        if reason := self._reason_not_to(program, groups, size):
            return finish(program, program, 0, (reason,))
        if size > _LONGEST:
            raise UsageError(
                f"a slot of {size} tokens is too long: the most is {_LONGEST}",
                where=self.name,
                hint="lower runtime.max_context, or keep keys and values in pages",
            )
        return finish(program, replace(program, resources=groups), len(groups))

    def _aligned(self, group: KvGroup, tokens: int) -> int:
        """The fewest tokens from `tokens` on whose keys and values take whole multiples."""
        element = element_type(group.dtype).size_bytes
        rows = (group.num_kv_heads * dim for dim in (group.key_head_dim, group.value_head_dim))
        alike = (self.align_bytes // math.gcd(row * element, self.align_bytes) for row in rows)
        step = math.lcm(*alike)
        return -(-tokens // step) * step

    def _reason_not_to(self, program: Program, groups: Sequence[Resource], size: int) -> str:
        """Why blocks are to stay as they are; empty where there is no reason."""
        kept = [one for one in groups if isinstance(one, KvGroup)]
        if self.plain:
            for one in kept:
                if one.dtype != DType.F32.value:
                    return f"the group {one.name} is in {one.dtype}, not in f32"
                if one.key_head_dim != one.value_head_dim:
                    return f"keys and values of the group {one.name} are of two sizes"
        if self.most_bytes is None:
            return ""
        if size > _LONGEST:
            return f"a slot of {size} tokens is longer than {_LONGEST}"
        symbols = [program.symbols[name].high for name in ("T", "R") if name in program.symbols]
        sequences = min(symbols, default=1)
        taken = sequences * sum(one.bytes_per_block() for one in kept)
        if taken > self.most_bytes:
            limit = format_size(self.most_bytes)
            return f"slots for {sequences} sequences take {format_size(taken)}, more than {limit}"
        return ""
