"""Steps over the blocks of one artifact as steps over those of another, in smaller blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...ir.errors import UsageError
from ...ir.resources import Resource
from ...runtime.scheduling.kv_groups import blocks_for, common_block_size
from ...runtime.scheduling.step import Int32Array, Step


@dataclass(frozen=True, slots=True)
class Layout:
    """How block tables of a scheduler become those of groups in other blocks.

    Each block of the scheduler is `ratio` blocks of `fine` tokens that follow each other; block 0
    is the null block on both sides. `sources` has for each group the one of the scheduler whose
    table it has.
    """

    coarse: int
    fine: int
    sources: tuple[int, ...]

    @classmethod
    def between(
        cls, scheduled: Sequence[Resource], groups: Sequence[Resource], max_tokens: int, where: str
    ) -> Layout:
        """The layout of `groups` where `scheduled` are planned, of at most `max_tokens` a sequence.

        UsageError where a group has a window that the scheduler knows nothing of, or blocks do not
        consist of whole smaller ones.
        """
        coarse, fine = common_block_size(scheduled), common_block_size(groups)
        reaches = [group.reach for group in scheduled]
        sources = []
        for group in groups:
            # What keeps everything has what a window needs as well.
            found = [reach for reach in (group.reach, None) if reach in reaches]
            if not found:
                window = "no window" if group.reach is None else f"a window of {group.reach}"
                raise UsageError(
                    f"the other artifact has no layers with {window}",
                    where=where,
                    hint="compare artifacts of one model",
                )
            sources.append(reaches.index(found[0]))
        if coarse % fine and coarse < max_tokens:
            raise UsageError(
                f"blocks of {coarse} and of {fine} tokens cannot hold the same sequences",
                where=where,
                hint="compile one with a kv_cache.block_size that is a multiple of the other's",
            )
        return cls(coarse, fine, tuple(sources))

    @property
    def ratio(self) -> int:
        """Smaller blocks of one of the scheduler's."""
        return blocks_for(self.coarse, self.fine)

    def num_blocks(self, counts: Sequence[int]) -> tuple[int, ...]:
        """Blocks of each group, where the scheduler has so many of its own."""
        return tuple(1 + (counts[source] - 1) * self.ratio for source in self.sources)

    def translated(self, step: Step) -> Step:
        """The step over the smaller blocks."""
        width = blocks_for(int(step.context_lengths.max()), self.fine)
        return replace(
            step,
            block_tables=tuple(self._tables(step.block_tables[one], width) for one in self.sources),
            slots=tuple(self._slots(step.slots[one]) for one in self.sources),
            block_copies=tuple(self._copies(step.block_copies[one]) for one in self.sources),
        )

    def _firsts(self, blocks: Int32Array) -> Int32Array:
        """The first small block of each; the null block's is not used, as it has only one."""
        return 1 + (blocks - 1) * self.ratio

    def _tables(self, table: Int32Array, width: int) -> Int32Array:
        parts = np.arange(self.ratio, dtype=np.int32)
        small = np.where(table[..., None] > 0, self._firsts(table)[..., None] + parts, 0)
        flat = small.reshape(len(table), -1)[:, :width]
        return np.ascontiguousarray(flat, dtype=np.int32)

    def _slots(self, slots: Int32Array) -> Int32Array:
        blocks, places = slots // self.coarse, slots % self.coarse
        small = np.where(blocks > 0, self._firsts(blocks) * self.fine + places, places % self.fine)
        return np.ascontiguousarray(small, dtype=np.int32)

    def _copies(self, copies: Int32Array) -> Int32Array:
        parts = np.arange(self.ratio, dtype=np.int32)
        small = self._firsts(copies)[:, None, :] + parts[:, None]
        return np.ascontiguousarray(small.reshape(-1, 2), dtype=np.int32)
