"""A model whose cache can be checked: what it stores for a token stands for the whole prefix."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from infc.ir.program import KvGroup
from infc.runtime.executors.base import wanted_rows
from infc.runtime.scheduling.step import Step

_EMPTY = 1


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


def make_group(name: str, block_size: int, window: int | None) -> KvGroup:
    """A KV group of one layer."""
    return KvGroup(name, (0,), 1, 4, 4, "f32", block_size, window)


class PagedModel:
    """An executor that keeps one state a slot, and reads them through the block tables alone.

    Each step asserts that every position which a query can see holds the state of exactly its
    own sequence's prefix, and that nothing is written where another sequence reads, but whole
    blocks that are the same for both.
    """

    def __init__(
        self, groups: Sequence[KvGroup], num_blocks: Sequence[int], vocab_size: int
    ) -> None:
        self.groups = groups
        self.vocab_size = vocab_size
        self.stores = [
            np.zeros(count * group.block_size, np.int64)
            for group, count in zip(groups, num_blocks, strict=True)
        ]
        self.num_tokens = 0
        self.num_copies = 0

    def run(self, step: Step) -> NDArray[np.float32]:
        self.num_tokens += step.num_tokens
        self._check_shape(step)
        for g, copies in enumerate(step.block_copies):
            self._copy(g, copies)
        spans = list(pairwise(step.query_starts.tolist()))
        for g in range(len(self.groups)):
            self._check_writes(step, g, spans)
            for b, (start, stop) in enumerate(spans):
                self._write(step, g, b, start, stop)
        for g in range(len(self.groups)):
            for b, (start, stop) in enumerate(spans):
                self._check_reads(step, g, b, start, stop)
        if step.hidden is not None:
            self._fill_hidden(step, spans, step.hidden)
        if not step.needs_head:
            return np.zeros((0, self.vocab_size), np.float32)
        rows = [self._logits(step, spans, row) for row in step.logits_index.tolist()]
        return wanted_rows(step, np.array(rows, np.float32).reshape(-1, self.vocab_size))

    def close(self) -> None:
        self.stores = []

    def _check_shape(self, step: Step) -> None:
        arrays = [step.token_ids, step.positions, step.query_starts, step.context_lengths]
        arrays += [*step.block_tables, *step.slots, *step.block_copies, step.logits_index]
        assert all(a.dtype == np.int32 and a.flags.c_contiguous for a in arrays)
        assert step.query_starts[-1] == step.num_tokens > 0
        assert len(step.requests) == step.num_sequences
        assert len(step.sampled) == len(step.sampled_rows)
        prompt_rows = [p.first_row + i for p in step.prompt_rows for i in range(p.count)]
        assert sorted({*prompt_rows, *step.sampled_rows}) == list(range(len(step.logits_index)))
        assert set(prompt_rows).isdisjoint(step.sampled_rows)
        assert np.all(np.diff(step.logits_index) > 0)
        for request, (start, stop), length in zip(
            step.requests,
            pairwise(step.query_starts.tolist()),
            step.context_lengths.tolist(),
            strict=True,
        ):
            assert stop > start
            positions = step.positions[start:stop].tolist()
            assert positions == list(range(length - (stop - start), length))
            assert step.token_ids[start:stop].tolist() == request.token_ids[positions[0] : length]

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
        return block * size + position % size

    def _write(self, step: Step, g: int, b: int, start: int, stop: int) -> None:
        """A token's state follows from the one stored before it, where the window shows that."""
        store, tokens = self.stores[g], step.requests[b].token_ids
        for row in range(start, stop):
            position = int(step.positions[row])
            if self.groups[g].window == 1 and position:
                state = prefix_states(tokens[:position])[-1]
            else:
                before = self._slot(step, g, b, position - 1) if position else None
                state = _EMPTY if before is None else int(store[before])
            slot = int(step.slots[g][row])
            assert slot == self._slot(step, g, b, position)
            store[slot] = mix(state, int(step.token_ids[row]))

    def _check_reads(self, step: Step, g: int, b: int, start: int, stop: int) -> None:
        window = self.groups[g].window
        expected = prefix_states(step.requests[b].token_ids)
        first = int(step.positions[start])
        low = 0 if window is None else max(0, first - window + 1)
        for position in range(low, int(step.positions[stop - 1]) + 1):
            assert int(self.stores[g][self._slot(step, g, b, position)]) == expected[position]

    def _state(self, step: Step, spans: list[tuple[int, int]], row: int) -> int:
        b = next(b for b, (start, stop) in enumerate(spans) if start <= row < stop)
        return int(self.stores[0][self._slot(step, 0, b, int(step.positions[row]))])

    def _logits(self, step: Step, spans: list[tuple[int, int]], row: int) -> NDArray[np.float32]:
        return logits_of(self._state(step, spans, row), self.vocab_size)

    def _fill_hidden(
        self, step: Step, spans: list[tuple[int, int]], hidden: NDArray[np.float32]
    ) -> None:
        for row, token in zip(hidden, step.logits_index.tolist(), strict=True):
            row[:] = hidden_of(self._state(step, spans, token), len(row))
