"""The KV cache as block tables: every group of every sequence, prefix reuse and windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ...ir.resources import Resource
from ..requests.sequence_blocks import SequenceBlocks
from .blocks import NULL_BLOCK, BlockPool
from .kv_groups import (
    blocks_alone,
    blocks_for,
    common_block_size,
    first_visible_block,
    most_blocks,
)
from .step import NO_PAIRS, Int32Array


@dataclass(frozen=True, slots=True)
class Headroom:
    """Blocks that stay free in each pool for those that run.

    `growth` counts where nothing is given back before the end, which is where all is kept.
    """

    blocks: int = 0
    growth: int = 0

    def of(self, group: Resource) -> int:
        """Blocks of that group's pool."""
        return max(self.blocks, self.growth) if group.reach is None else self.blocks


@dataclass(slots=True, eq=False)
class StepBlocks:
    """What is noted of blocks from the planning of a step until it has run: (group, block) each.

    `registered_early` are those that it writes and that others find already, `sources` those that
    it copies from.
    """

    registered_early: set[tuple[int, int]] = field(default_factory=set)
    sources: list[tuple[int, int]] = field(default_factory=list)


class KvCache:
    """Block tables of all sequences over one pool a group; knows no request and no tensor.

    `num_blocks[g]` counts the null block. With no step in flight every sequence holds exactly the
    blocks that its next token can see, and those set aside for the rest of its prompt.

    A full block is found by others from the moment that the step which writes it is planned: a
    step writes the KV of all its tokens before any of them attends (`docs/design/step.md`), and
    steps run one after the other. Where its tokens are not known then, it is found once the step
    is settled (`register`).
    """

    def __init__(
        self,
        groups: Sequence[Resource],
        num_blocks: Sequence[int],
        *,
        max_sequences: int,
        max_context: int,
        prefix_reuse: bool = True,
    ) -> None:
        self.groups = tuple(groups)
        self.block_size = common_block_size(groups)
        # Blocks that no sequence fills are never found again. Engines that have a sequence in each
        # compute all from the first of a step to the last, which should lie close together.
        lowest_first = self.block_size > max_context
        self.pools = tuple(BlockPool(count, lowest_first=lowest_first) for count in num_blocks)
        self.max_context = max_context
        self.prefix_reuse = prefix_reuse
        width = blocks_for(max_context, self.block_size)
        self._tables = [np.zeros((max_sequences, width), np.int32) for _ in self.groups]
        self._free_slots = list(range(max_sequences - 1, -1, -1))
        self._copies: list[list[tuple[int, int]]] = [[] for _ in self.groups]
        self._no_copies = (NO_PAIRS,) * len(self.groups)
        self._plan = StepBlocks()  # of the step that is being planned
        self._in_flight: list[StepBlocks] = []
        self._indices = range(len(self.groups))
        self._passing = [g for g in self._indices if self.groups[g].reach is not None]
        self.frees_early = bool(self._passing)

    def holds_alone(self, num_tokens: int) -> bool:
        """Whether one sequence of that many tokens fits when it has the pools to itself."""
        return all(
            blocks_alone(group, num_tokens) <= pool.capacity
            for group, pool in zip(self.groups, self.pools, strict=True)
        )

    @property
    def has_one_block_each(self) -> bool:
        """Whether a block holds a whole context, so that no sequence ever grows by another."""
        return self.block_size >= self.max_context

    def copies_next(self, blocks: SequenceBlocks) -> bool:
        """Whether other sequences have its last block too: it copies it before it writes."""
        return any(
            ids and pool.references(ids[-1]) > 1
            for pool, ids in zip(self.pools, blocks.ids, strict=False)
        )

    # --- one sequence, from admission to its end ---------------------------------------------

    def admit(
        self,
        blocks: SequenceBlocks,
        tokens: Sequence[int],
        headroom: Headroom,
        reusable_tokens: int | None = None,
    ) -> int | None:
        """Give a sequence its batch slot, its reusable prefix and room for the rest of `tokens`.

        Returns how many tokens are in the cache already, at most `len(tokens) - 1` and
        `reusable_tokens`, or None when the pools have too few free blocks (beyond `headroom`);
        then nothing changed.
        """
        if not self._free_slots:
            return None
        hit = self._longest_hit(blocks, tokens, reusable_tokens)
        # A full hit copies its last block, for which there may be no room, or nothing to copy yet.
        if hit * self.block_size == len(tokens) and (
            self._is_registered_early(blocks.digests[hit - 1])
            or not self._fits(blocks, hit, len(tokens), headroom)
        ):
            hit = self._longest_hit(blocks, tokens, hit * self.block_size - 1)
        if not self._fits(blocks, hit, len(tokens), headroom):
            return None
        self._take_hit(blocks, hit, len(tokens))
        return min(hit * self.block_size, len(tokens) - 1)

    def fork(self, blocks: SequenceBlocks, twin: SequenceBlocks) -> bool:
        """Let `twin` begin as `blocks` is now, sharing every block; False with no batch slot free.

        All tokens of `blocks` are stored. Whoever writes into a shared block first gets a copy.
        """
        if not self._free_slots:
            return False
        twin.batch_slot = self._free_slots.pop()
        twin.digests = list(blocks.digests)
        twin.ids = [list(ids) for ids in blocks.ids]
        twin.first = list(blocks.first)
        twin.num_registered = blocks.num_registered
        twin.num_taken = len(blocks.ids[0])
        blocks.steady_tokens = 0  # what both hold is copied before it is written
        for g in self._indices:
            for block in twin.ids[g][twin.first[g] :]:
                self.pools[g].retain(block)
            self._tables[g][twin.batch_slot, : len(twin.ids[g])] = twin.ids[g]
        return True

    def extend(self, blocks: SequenceBlocks, tokens: Sequence[int], start: int, count: int) -> int:
        """Make room for the next `count` of `tokens`, from `start` on; how many have room.

        The step that is being planned stores them: blocks that are full then can be found.
        """
        if start + count < blocks.steady_tokens:  # as for most tokens but a prompt's
            return count
        fits = self._make_room(blocks, start, count)
        if fits > 0:
            blocks.steady_tokens = blocks_for(start + fits, self.block_size) * self.block_size
            if self.prefix_reuse:
                known = min(start + fits, len(tokens))
                self._plan.registered_early.update(self._register(blocks, tokens, known))
        return fits

    def register(self, blocks: SequenceBlocks, tokens: Sequence[int], num_computed: int) -> None:
        """Let others find what is full of the first `num_computed` tokens, which are stored."""
        if self.prefix_reuse and num_computed // self.block_size > blocks.num_registered:
            self._register(blocks, tokens, num_computed)

    def advance(self, blocks: SequenceBlocks, num_computed: int) -> None:
        """Note that the first `num_computed` tokens are stored: free what no later one needs."""
        for g in self._passing:
            self._pass(blocks, g, num_computed)

    def release(self, blocks: SequenceBlocks, *, forget: bool = False) -> None:
        """Give everything back; with `forget`, what was stored is not found again either."""
        if blocks.batch_slot is None:
            return
        for g in self._indices:
            pool, ids = self.pools[g], blocks.ids[g]
            # From the end, so that the start of a prefix is what stays longest.
            for block in reversed(ids[blocks.first[g] :]):
                if forget:
                    pool.forget(block)
                pool.release(block)
            self._tables[g][blocks.batch_slot, : len(ids)] = NULL_BLOCK
        self._free_slots.append(blocks.batch_slot)
        blocks.batch_slot = None
        blocks.ids, blocks.first = [], []
        blocks.num_registered = blocks.num_taken = blocks.steady_tokens = 0

    # --- a step's arrays ----------------------------------------------------------------------

    def tables(self, slots: NDArray[np.intp], num_tokens: int) -> tuple[Int32Array, ...]:
        """Block tables of sequences of at most `num_tokens` tokens, one array `[B, W]` a group."""
        width = blocks_for(num_tokens, self.block_size)
        return tuple(table[slots, :width] for table in self._tables)

    def take_copies(self) -> tuple[Int32Array, ...]:
        """The copies to make before the step writes; their sources live until `end_step`."""
        if not self._plan.sources:
            return self._no_copies
        taken = tuple(np.array(c, np.int32).reshape(-1, 2) for c in self._copies)
        self._copies = [[] for _ in self.groups]
        return taken

    def close_plan(self) -> StepBlocks | None:
        """The step is planned: what `end_step` takes once it has run, None for nothing."""
        plan = self._plan
        if not (plan.registered_early or plan.sources):
            return None
        self._plan = StepBlocks()
        self._in_flight.append(plan)
        return plan

    def end_step(self, blocks: StepBlocks | None, *, written: bool = True) -> None:
        """The step has run: the sources of its copies may be reused.

        Where it did not run to its end, not `written`, nobody finds what it had registered early.
        """
        if blocks is None:
            return
        self._in_flight.remove(blocks)
        if not written:
            for g, block in blocks.registered_early:
                self.pools[g].forget(block)
        for g, block in blocks.sources:
            self.pools[g].release(block)

    def check(self, sequences: Sequence[SequenceBlocks]) -> None:
        """Assert that pools, tables and the given (all living) sequences agree."""
        for g in self._indices:
            held = [b for s in sequences for b in s.ids[g][s.first[g] :]]
            for step in (*self._in_flight, self._plan):
                held += [block for group, block in step.sources if group == g]
            self.pools[g].check(held)
        slots = [s.batch_slot for s in sequences]
        assert None not in slots, "a sequence without a batch slot holds blocks"
        assert len({*slots, *self._free_slots}) == len(slots) + len(self._free_slots)
        assert len(slots) + len(self._free_slots) == len(self._tables[0]), "a batch slot is lost"
        for g in self._indices:
            expected = np.zeros_like(self._tables[g])
            for s in sequences:
                assert not any(s.ids[g][: s.first[g]]), "a block that no token needs is held"
                index = s.steady_tokens // self.block_size - 1
                assert index < len(s.ids[g]), "a block is to be got"
                expected[s.batch_slot, : len(s.ids[g])] = s.ids[g]
            assert np.array_equal(expected, self._tables[g]), "tables and sequences disagree"

    # --- inside -------------------------------------------------------------------------------

    def _longest_hit(
        self, blocks: SequenceBlocks, tokens: Sequence[int], reusable_tokens: int | None
    ) -> int:
        """Blocks of the longest reusable prefix: each group still has those that it needs."""
        limit = len(tokens) if reusable_tokens is None else min(len(tokens), reusable_tokens)
        limit //= self.block_size
        if not self.prefix_reuse or limit == 0:
            return 0
        blocks.extend_digests(tokens, len(tokens), self.block_size)
        passing = []
        for pool, group in zip(self.pools, self.groups, strict=True):
            if group.reach is not None:
                passing.append((group, _run_lengths(pool, blocks.digests[:limit])))
                continue
            for index in range(limit):  # it needs all of them: the first that is gone ends the hit
                if pool.lookup(blocks.digests[index]) is None:
                    limit = index
                    break
        for hit in range(limit, 0, -1):
            position = min(hit * self.block_size, len(tokens) - 1)
            needs = ((group.hit_needs(hit, position), runs) for group, runs in passing)
            if all(need is not None and runs[hit - 1] >= len(need) for need, runs in needs):
                return hit
        return 0

    def _is_registered_early(self, digest: bytes) -> bool:
        """Whether some group has that content only once the step that is planned has run."""
        registered_early = self._plan.registered_early
        return any((g, self.pools[g].lookup(digest)) in registered_early for g in self._indices)

    def _fits(self, blocks: SequenceBlocks, hit: int, num_tokens: int, headroom: Headroom) -> bool:
        """Whether each pool can serve the hit and the rest of the prompt."""
        position = min(hit * self.block_size, num_tokens - 1)
        copied = hit * self.block_size > position
        total = blocks_for(num_tokens, self.block_size)
        for pool, group in zip(self.pools, self.groups, strict=True):
            first = first_visible_block(group, position)
            needed = total - hit + copied
            most = most_blocks(group)
            if most is not None and not copied:
                needed = min(needed, most - (hit - first))
            for index in range(first, hit):
                block = pool.lookup(blocks.digests[index])
                assert block is not None
                needed += pool.is_free(block)
            if needed + headroom.of(group) > pool.num_free:
                return False
        return True

    def _take_hit(self, blocks: SequenceBlocks, hit: int, num_tokens: int) -> None:
        """Take a batch slot and the blocks of the hit; set the rest aside where all is kept."""
        blocks.batch_slot = self._free_slots.pop()
        position = min(hit * self.block_size, num_tokens - 1)
        blocks.ids = [[] for _ in self.groups]
        blocks.first = [0] * len(self.groups)
        blocks.num_registered = blocks.num_taken = hit
        for g in self._indices:
            pool, group = self.pools[g], self.groups[g]
            first = first_visible_block(group, position)
            ids = [NULL_BLOCK] * first
            for index in range(first, hit):
                block = pool.lookup(blocks.digests[index])
                assert block is not None
                pool.retain(block)
                ids.append(block)
            blocks.ids[g], blocks.first[g] = ids, first
            self._tables[g][blocks.batch_slot, :hit] = ids
        for g in self._indices:
            if self.groups[g].reach is None:
                self._grow(blocks, g, blocks_for(num_tokens, self.block_size))

    def _make_room(self, blocks: SequenceBlocks, start: int, count: int) -> int:
        size = self.block_size
        index = start // size
        fits = count
        shared = []
        for g in self._indices:
            pool, ids = self.pools[g], blocks.ids[g]
            free = pool.num_free
            if index < len(ids) and pool.is_shared(ids[index]):
                shared.append(g)
                free -= 1
                if free < 0:
                    return 0
            fits = min(fits, (len(ids) + free) * size - start)
        if fits <= 0:
            return 0
        for g in shared:
            self._copy_on_write(blocks, g, index)
        last = (start + fits - 1) // size
        for g in self._indices:
            if last >= len(blocks.ids[g]):
                self._grow(blocks, g, last + 1)
        return fits

    def _register(
        self, blocks: SequenceBlocks, tokens: Sequence[int], num_tokens: int
    ) -> list[tuple[int, int]]:
        """Let others find the full blocks of the first `num_tokens` tokens; those found anew."""
        full, anew = num_tokens // self.block_size, []
        blocks.extend_digests(tokens, num_tokens, self.block_size)
        for g in self._indices:
            pool, ids = self.pools[g], blocks.ids[g]
            for index in range(max(blocks.num_registered, blocks.first[g]), full):
                if pool.register(ids[index], blocks.digests[index]):
                    anew.append((g, ids[index]))
        blocks.num_registered = max(blocks.num_registered, full)
        return anew

    def _grow(self, blocks: SequenceBlocks, g: int, num_blocks: int) -> None:
        pool, ids = self.pools[g], blocks.ids[g]
        table = self._tables[g]
        for index in range(len(ids), num_blocks):
            block = pool.allocate()
            ids.append(block)
            table[blocks.batch_slot, index] = block

    def _copy_on_write(self, blocks: SequenceBlocks, g: int, index: int) -> None:
        """Replace a shared block by a copy of its own; the old reference goes at `end_step`."""
        source = blocks.ids[g][index]
        copy = self.pools[g].allocate()
        self._copies[g].append((source, copy))
        self._plan.sources.append((g, source))
        blocks.ids[g][index] = copy
        self._tables[g][blocks.batch_slot, index] = copy

    def _pass(self, blocks: SequenceBlocks, g: int, num_computed: int) -> None:
        first = min(first_visible_block(self.groups[g], num_computed), len(blocks.ids[g]))
        for index in range(blocks.first[g], first):
            self.pools[g].release(blocks.ids[g][index])
            blocks.ids[g][index] = NULL_BLOCK
            self._tables[g][blocks.batch_slot, index] = NULL_BLOCK
        blocks.first[g] = max(first, blocks.first[g])


def _run_lengths(pool: BlockPool, digests: Sequence[bytes]) -> list[int]:
    """For each index, how many blocks that end there are found in a row."""
    runs, run = [], 0
    for digest in digests:
        run = run + 1 if pool.lookup(digest) is not None else 0
        runs.append(run)
    return runs
