"""A model whose cache can be checked: what it stores for a token stands for the whole prefix."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from infc.ir.resources import KvGroup, LatentGroup, Resource, StateGroup
from infc.runtime.executors.base import Finished, head_output
from infc.runtime.scheduling.step import Step

_EMPTY = 1

Kept = int | Literal["latent", "state"] | None
"""What a group keeps: the keys and values of a window, or of all tokens (None), or other things."""

KEPT: st.SearchStrategy[Kept] = st.none() | st.integers(1, 9) | st.sampled_from(["latent", "state"])


def mix(state: int, token: int) -> int:
    """The state after one more token."""
    digest = hashlib.blake2b(f"{state},{token}".encode(), digest_size=7).digest()
    return int.from_bytes(digest)


def prefix_states(tokens: Sequence[int]) -> list[int]:
    """The state after each token."""
    states, state = [], _EMPTY
    for token in tokens:
        state = mix(state, token)
        states.append(state)
    return states


def logits_of(state: int, vocab_size: int) -> NDArray[np.float32]:
    """The model's logits after a prefix, spread enough that every prefix has a clear winner."""
    return np.random.default_rng(state).standard_normal(vocab_size).astype(np.float32)


def hidden_of(state: int, width: int) -> NDArray[np.float32]:
    """The hidden state after a prefix."""
    return np.random.default_rng([state, 1]).standard_normal(width).astype(np.float32)


def make_group(name: str, block_size: int, kept: Kept, layers: int = 1) -> Resource:
    """A group of so many layers."""
    if kept == "latent":
        return LatentGroup(name, tuple(range(layers)), 8, 4, "bf16", block_size)
    if kept == "state":
        return StateGroup(name, tuple(range(layers)), 96, "f32", block_size)
    return KvGroup(name, tuple(range(layers)), 1, 4, 4, "f32", block_size, kept)


class PagedModel:
    """An executor that keeps one state a slot, and reads them through the block tables alone.

    Each step asserts that the positions which a query can see hold the states of one prefix, and
    that nothing is written where another sequence reads, but whole blocks that are the same for
    both. Whether it is the right prefix shows in the tokens: see `scheduling.alone`.

    Running state is one a block: that after the last token computed there. The states after the
    tokens of a step are then known from the step alone.

    With a window of one token nothing before a token can be seen. Its state then follows from
    what another group stores, so one group must have a larger window, or keep all.
    """

    depth = 0

    def __init__(
        self,
        groups: Sequence[Resource],
        num_blocks: Sequence[int],
        vocab_size: int,
        hidden_width: int = 0,
    ) -> None:
        self.groups = groups
        self.vocab_size = vocab_size
        self.hidden_width = hidden_width
        self.stores = [
            np.zeros(count * group.block_size, np.int64)
            for group, count in zip(groups, num_blocks, strict=True)
        ]
        self.num_tokens = 0
        self.num_copies = 0
        self._is_running = [isinstance(group, StateGroup) for group in groups]
        # The first to be written is one whose states follow from its own, and stay.
        self._order = sorted(
            range(len(groups)), key=lambda g: groups[g].reach == 1 or self._is_running[g]
        )
        others = {group.reach for group in groups}
        assert 1 not in others or not self._is_running[self._order[0]]
        assert groups[self._order[0]].reach != 1
        self._after: dict[int, int] = {}  # by row of the step: the state after its token
        self._before: dict[int, int] = {}  # state -> the one before it
        self._drawn = np.zeros(0, np.int32)  # by the step before

    def launch(self, step: Step) -> Finished:
        self.num_tokens += step.num_tokens
        self._check_shape(step)
        step = self._with_carried(step)
        for g, copies in enumerate(step.block_copies):
            self._copy(g, copies)
        spans = list(pairwise(step.query_starts.tolist()))
        for g in self._order:
            self._check_writes(step, g, spans)
            for b, (start, stop) in enumerate(spans):
                self._write(step, g, b, start, stop)
        for g in range(len(self.groups)):
            for b, (start, stop) in enumerate(spans):
                self._check_reads(step, g, b, start, stop)
        hidden = self._hidden(step, spans) if step.wants_hidden else None
        rows = []
        if step.needs_head:
            rows = [self._logits(step, spans, row) for row in step.logits_index.tolist()]
        logits = np.array(rows, np.float32).reshape(-1, self.vocab_size)
        output = head_output(step, logits, hidden)
        self._drawn = output.tokens
        return Finished(output)

    def spoil(self, step: Step) -> None:
        """What a step leaves that fails on its way: nobody may read what it was to write."""
        for g, store in enumerate(self.stores):
            size = self.groups[g].block_size
            slots = step.slots[g]
            store[slots - slots % size if self._is_running[g] else slots] = -1
            for block in step.block_copies[g][:, 1].tolist():
                store[block * size : (block + 1) * size] = -1

    def close(self) -> None:
        self.stores = []

    def _with_carried(self, step: Step) -> Step:
        """The step with all of its tokens."""
        if not len(step.carried):
            return step
        token_ids = step.token_ids.copy()
        places, draws = step.carried.T
        assert not token_ids[places].any()
        token_ids[places] = np.maximum(self._drawn[draws], 0)
        return replace(step, token_ids=token_ids)

    def _check_shape(self, step: Step) -> None:
        arrays = [step.token_ids, step.positions, step.query_starts, step.context_lengths]
        arrays += [*step.block_tables, *step.slots, *step.block_copies, step.logits_index]
        arrays += [step.carried]
        assert all(a.dtype == np.int32 and a.flags.c_contiguous for a in arrays)
        assert step.query_starts[-1] == step.num_tokens > 0
        assert np.all(np.diff(step.logits_index) > 0)
        spans = pairwise(step.query_starts.tolist())
        for (start, stop), length in zip(spans, step.context_lengths.tolist(), strict=True):
            assert stop > start
            positions = step.positions[start:stop].tolist()
            assert positions == list(range(length - (stop - start), length))

    def _copy(self, g: int, copies: NDArray[np.int32]) -> None:
        size, store = self.groups[g].block_size, self.stores[g]
        self.num_copies += len(copies)
        for source, destination in copies.tolist():
            assert source and destination
            store[destination * size : (destination + 1) * size] = store[
                source * size : (source + 1) * size
            ]

    def _check_writes(self, step: Step, g: int, spans: list[tuple[int, int]]) -> None:
        size, table = self.groups[g].block_size, step.block_tables[g]
        slots = step.slots[g]
        assert not {*step.block_copies[g][:, 0].tolist()} & {*(slots // size).tolist()}
        assert len(set(slots.tolist())) == len(slots)
        assert slots.min() >= size, "the null block is written"
        for b, (start, stop) in enumerate(spans):
            others = set(np.delete(table, b, axis=0).ravel().tolist()) - {0}
            # Others may read what this step writes, if it is full then: what they must find in it
            # is checked once all is written.
            full = table[b, : int(step.context_lengths[b]) // size].tolist()
            assert others.isdisjoint({*(slots[start:stop] // size).tolist()} - {*full})

    def _slot(self, step: Step, g: int, b: int, position: int) -> int:
        size = self.groups[g].block_size
        block = int(step.block_tables[g][b, position // size])
        assert block, "the null block is read"
        return block * size + self._place(g, position)

    def _place(self, g: int, position: int) -> int:
        """Where in a block a token's state lies."""
        return 0 if self._is_running[g] else position % self.groups[g].block_size

    def _write(self, step: Step, g: int, b: int, start: int, stop: int) -> None:
        """A token's state follows from the one stored before it, where the window shows that."""
        store = self.stores[g]
        read = self._order[0] if self.groups[g].reach == 1 else g
        for row in range(start, stop):
            position, state = int(step.positions[row]), _EMPTY
            if position:
                state = int(self.stores[read][self._slot(step, read, b, position - 1)])
            slot = self._slot(step, g, b, position)
            size = self.groups[g].block_size
            assert int(step.slots[g][row]) == slot - self._place(g, position) + position % size
            store[slot] = self._after[row] = after = mix(state, int(step.token_ids[row]))
            self._before[after] = state

    def _check_reads(self, step: Step, g: int, b: int, start: int, stop: int) -> None:
        first, last = int(step.positions[start]), int(step.positions[stop - 1])
        low = last if self._is_running[g] else self.groups[g].keeps(first)
        expected = int(self.stores[g][self._slot(step, g, b, last)])
        for position in range(last, low - 1, -1):
            assert int(self.stores[g][self._slot(step, g, b, position)]) == expected
            expected = self._before[expected]
            assert (expected == _EMPTY) == (position == 0)

    def _state(self, step: Step, spans: list[tuple[int, int]], row: int) -> int:
        if self._is_running[0]:
            return self._after[row]
        b = next(b for b, (start, stop) in enumerate(spans) if start <= row < stop)
        return int(self.stores[0][self._slot(step, 0, b, int(step.positions[row]))])

    def _logits(self, step: Step, spans: list[tuple[int, int]], row: int) -> NDArray[np.float32]:
        return logits_of(self._state(step, spans, row), self.vocab_size)

    def _hidden(self, step: Step, spans: list[tuple[int, int]]) -> NDArray[np.float32]:
        states = [self._state(step, spans, token) for token in step.logits_index.tolist()]
        rows = [hidden_of(state, self.hidden_width) for state in states]
        return np.array(rows, np.float32).reshape(len(rows), self.hidden_width)
