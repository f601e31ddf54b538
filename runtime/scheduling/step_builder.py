"""From who computes how many tokens to the arrays of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..requests.request import Request
from ..sampling.draws import Draws, draws_of, next_draws
from .kv_cache import KvCache
from .step import Int32Array, PromptRows, Step

Plan = Sequence[tuple[Request, int]]


class _Rows:
    """Which tokens of the step give a row, who waits for it, and whether for its logits."""

    def __init__(self) -> None:
        self.index: list[int] = []
        self.sampled: list[Request] = []
        self.sampled_rows: list[int] = []
        self.prompts: list[PromptRows] = []
        self.logits: list[int] = []
        self.drawn: list[tuple[Request, int]] = []

    def add_prompt(self, request: Request, first_token: int, start: int, count: int) -> None:
        """The rows of a chunk that a prompt still lacks; `start` is the chunk's position."""
        first = max(start, request.num_prompt_rows)
        wanted = min(start + count, request.num_prompt_tokens - 1) - first
        if wanted > 0:
            row = len(self.index)
            self.prompts.append(PromptRows(request, row, first, wanted))
            begin = first_token + first - start
            self.index.extend(range(begin, begin + wanted))
            if request.pool is None:
                self.logits.extend(range(row, row + wanted))

    def add_sample(self, request: Request, token: int) -> None:
        """The row that the request's next token comes from, and that of all its choices."""
        row = len(self.index)
        self.index.append(token)
        self.sampled.append(request)
        self.sampled_rows.append(row)
        if request.unforked:
            self.sampled += request.unforked
            self.sampled_rows += [row] * len(request.unforked)
        if request.pool is None:
            if request.needs_logits:
                self.logits.append(row)
            if request.adjuster is None:
                self.drawn.append((request, row))
                self.drawn += [(choice, row) for choice in request.unforked]

    @property
    def with_logits(self) -> Int32Array | None:
        """`Step.logits_rows`."""
        return None if len(self.logits) == len(self.index) else np.array(self.logits, np.int32)

    @property
    def draws(self) -> Draws:
        """`Step.draws`."""
        return draws_of(request.next_draw(row) for request, row in self.drawn)


@dataclass(frozen=True, slots=True)
class _Places:
    """Where the tokens of a step stand: in which sequence [T], and at which position of it [T]."""

    query_starts: Int32Array
    context_lengths: Int32Array
    sequence: Int32Array
    positions: Int32Array

    @classmethod
    def of(cls, starts: list[int], counts: list[int]) -> _Places:
        """Sequence b computes `counts[b]` tokens from position `starts[b]` on."""
        first, count = np.array(starts, np.int32), np.array(counts, np.int32)
        query_starts = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(count, out=query_starts[1:])
        sequence, positions = np.arange(len(counts), dtype=np.int32), first
        num_tokens = int(query_starts[-1])
        if num_tokens > len(counts):  # else each has one token, and that is its position
            sequence = np.repeat(sequence, count)
            tokens = np.arange(num_tokens, dtype=np.int32)
            positions = tokens + (first - query_starts[:-1])[sequence]
        return cls(query_starts, first + count, sequence, positions)

    def slots(self, tables: Sequence[Int32Array], block_size: int) -> tuple[Int32Array, ...]:
        """Where each token's KV goes, by the block tables of each group."""
        index, offset = np.divmod(self.positions, np.int32(block_size))
        return tuple(table[self.sequence, index] * block_size + offset for table in tables)


class StepBuilder:
    """Builds one step after the other.

    Most are like the last: the same sequences, each of which got a token then, and computes it
    now. Such a step takes over what does not change.
    """

    def __init__(self, kv: KvCache) -> None:
        self._kv = kv
        self._last: Step | None = None  # if each of its sequences computed one token and got one
        self._seats: NDArray[np.intp] = np.zeros(0, np.intp)

    def build(self, plan: Plan) -> Step:
        """The step in which each request computes that many of its tokens."""
        requests = tuple([request for request, _ in plan])
        if self._last is not None and self._last.requests == requests:
            step = self._next(self._last)
        else:
            self._seats = np.array([request.blocks.seat for request in requests], np.intp)
            step = self._fresh(plan, requests)
        is_plain = step.num_tokens == len(requests) and step.sampled == requests
        self._last = step if is_plain else None
        return step

    def _next(self, last: Step) -> Step:
        """What follows `last`, whose `logits_index` counts its sequences, with the same ones."""
        context_lengths = last.context_lengths + np.int32(1)
        places = _Places(
            last.query_starts, context_lengths, last.logits_index, last.context_lengths
        )
        tables = self._kv.tables(self._seats, int(context_lengths.max()))
        return replace(
            last,
            token_ids=np.array([request.token_ids[-1] for request in last.requests], np.int32),
            positions=places.positions,
            context_lengths=context_lengths,
            block_tables=tables,
            slots=places.slots(tables, self._kv.block_size),
            block_copies=self._kv.take_copies(),
            draws=next_draws(last.draws),
            tokens=np.empty_like(last.tokens),
        )

    def _fresh(self, plan: Plan, requests: tuple[Request, ...]) -> Step:
        token_ids: list[int] = []
        rows = _Rows()
        starts, counts = [], []
        for request, count in plan:
            start, tokens = request.num_computed, request.token_ids
            if request.wants_prompt_rows:
                rows.add_prompt(request, len(token_ids), start, count)
            token_ids += tokens[start : start + count]
            starts.append(start)
            counts.append(count)
            if start + count == len(tokens):
                rows.add_sample(request, len(token_ids) - 1)
        places = _Places.of(starts, counts)
        tables = self._kv.tables(self._seats, int(places.context_lengths.max()))
        return Step(
            token_ids=np.array(token_ids, np.int32),
            positions=places.positions,
            query_starts=places.query_starts,
            context_lengths=places.context_lengths,
            block_tables=tables,
            slots=places.slots(tables, self._kv.block_size),
            block_copies=self._kv.take_copies(),
            logits_index=np.array(rows.index, np.int32),
            logits_rows=rows.with_logits,
            draws=rows.draws,
            tokens=np.empty(len(rows.drawn), np.int32),
            requests=requests,
            sampled=tuple(rows.sampled),
            sampled_rows=tuple(rows.sampled_rows),
            prompt_rows=tuple(rows.prompts),
        )


def asks_for_hidden(step: Step, width: int | None) -> Step:
    """The step with room for hidden states, where any of its requests pools them."""
    receivers = [*step.sampled, *(rows.request for rows in step.prompt_rows)]
    if not any(request.pool is not None for request in receivers):
        return step
    assert width is not None, "requests that pool are refused where there are no hidden states"
    return replace(
        step,
        hidden=np.empty((len(step.logits_index), width), np.float32),
    )


class RowBudget:
    """Rows of logits that a step may still have; every sequence in it keeps one for its token."""

    def __init__(self, num_rows: int, num_sequences: int) -> None:
        self.spare = num_rows - num_sequences

    def most_tokens(self, request: Request) -> int:
        """How many tokens a request that wants rows of its prompt may compute at most."""
        # Each token from the first row that is missing gives one, up to the prompt's last.
        return max(0, request.num_prompt_rows - request.num_computed) + 1 + self.spare

    def take(self, request: Request, count: int) -> None:
        """A request that wants rows of its prompt computes so many tokens."""
        first = max(request.num_computed, request.num_prompt_rows)
        self.spare -= max(0, request.num_computed + count - first - 1)
