"""From who computes how many tokens to the arrays of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..faults import note_fault
from ..requests.request import Request, RequestState
from ..sampling.adjustments import Adjustment, Adjustments, Mask, gather
from ..sampling.draws import Draw, draws_of, next_draws
from .kv_cache import KvCache
from .owners import PlannedStep, PromptRows, StepOwners
from .step import NO_PAIRS, Int32Array, Step

Plan = Sequence[tuple[Request, int]]


class _Rows:
    """Which tokens of the step give a row, who waits for it, and whether for its logits."""

    def __init__(self) -> None:
        self.index: list[int] = []
        self.sampled: list[Request] = []
        self.sampled_rows: list[int] = []
        self.prompts: list[PromptRows] = []
        self.logits: list[int] = []
        self.drawn: list[Request] = []
        self.draws: list[Draw] = []

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

    def add_sample(self, request: Request, token: int, position: int) -> None:
        """The row of the request's token at `position`, which is also that of all its choices."""
        row = len(self.index)
        self.index.append(token)
        self.sampled.append(request)
        self.sampled_rows.append(row)
        if request.unforked:
            self.sampled += request.unforked
            self.sampled_rows += [row] * len(request.unforked)
        if request.pool is None:
            if request.num_logprobs is not None:
                self.logits.append(row)
            self.drawn.append(request)
            self.draws.append(request.draw(row, position))
            self.drawn += request.unforked
            self.draws += [choice.draw(row, position) for choice in request.unforked]

    @property
    def with_logits(self) -> Int32Array | None:
        """`Step.logits_rows`."""
        return None if len(self.logits) == len(self.index) else np.array(self.logits, np.int32)

    def owners(self, requests: tuple[Request, ...]) -> StepOwners:
        """Whose step it is."""
        return StepOwners(
            requests=requests,
            sampled=tuple(self.sampled),
            sampled_rows=tuple(self.sampled_rows),
            prompt_rows=tuple(self.prompts),
        )


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
        # Where each of its sequences computed one token and got one.
        self._last: PlannedStep | None = None
        self._drawn: list[Request] = []  # who gets a token in the last step, by its draw
        self._batch_slots: NDArray[np.intp] = np.zeros(0, np.intp)

    def build(self, plan: Plan) -> PlannedStep:
        """The step in which each request computes that many of its tokens."""
        requests = tuple([request for request, _ in plan])
        if self._last is not None and self._last.owners.requests == requests:
            planned = self._next(self._last)
        else:
            self._batch_slots = np.array(
                [request.blocks.batch_slot for request in requests], np.intp
            )
            planned = self._fresh(plan, requests)
        is_plain = planned.step.num_tokens == len(requests) and planned.owners.sampled == requests
        self._last = planned if is_plain else None
        return planned

    def draws(self, request: Request) -> bool:
        """Whether the last step draws a token of the request."""
        return request in self._drawn

    def forget(self) -> None:
        """The last steps will not run, or their requests begin anew: nothing follows from them."""
        self._last, self._drawn = None, []

    def _next(self, last: PlannedStep) -> PlannedStep:
        """What follows `last`, whose `logits_index` counts its sequences, with the same ones."""
        before, requests = last.step, last.owners.requests
        context_lengths = before.context_lengths + np.int32(1)
        places = _Places(
            before.query_starts, context_lengths, before.logits_index, before.context_lengths
        )
        tables = self._kv.tables(self._batch_slots, int(context_lengths.max()))
        carried = NO_PAIRS
        if requests[0].num_computed < len(requests[0].token_ids):
            token_ids = np.array([request.token_ids[-1] for request in requests], np.int32)
        else:  # `last` is in flight: each token is the one that it draws for that sequence
            assert self._drawn == [*requests]
            token_ids = np.zeros(len(requests), np.int32)
            carried = np.repeat(np.arange(len(requests), dtype=np.int32), 2).reshape(-1, 2)
        draws = next_draws(before.draws)
        step = Step(  # `dataclasses.replace` takes several times as long
            token_ids=token_ids,
            positions=places.positions,
            query_starts=places.query_starts,
            context_lengths=context_lengths,
            block_tables=tables,
            slots=places.slots(tables, self._kv.block_size),
            block_copies=self._kv.take_copies(),
            logits_index=before.logits_index,
            logits_rows=before.logits_rows,
            draws=draws,
            adjustments=(
                None
                if before.adjustments is None
                else adjustments_of(self._drawn, draws["position"].tolist())
            ),
            carried=carried,
        )
        return PlannedStep(step, last.owners, self._kv.close_plan())

    def _fresh(self, plan: Plan, requests: tuple[Request, ...]) -> PlannedStep:
        token_ids: list[int] = []
        rows, carried = _Rows(), []
        draws: dict[Request, int] = {}
        starts, counts = [], []
        for request, count in plan:
            start, tokens = request.num_computed, request.token_ids
            if request.wants_prompt_rows:
                rows.add_prompt(request, len(token_ids), start, count)
            if start < len(tokens):
                token_ids += tokens[start : start + count]
            else:  # the last step is in flight, and draws it
                draws = draws or {who: place for place, who in enumerate(self._drawn)}
                carried.append((len(token_ids), draws[request]))
                token_ids.append(0)
            starts.append(start)
            counts.append(count)
            if start + count >= len(tokens):
                rows.add_sample(request, len(token_ids) - 1, start + count)
        self._drawn = rows.drawn
        places = _Places.of(starts, counts)
        tables = self._kv.tables(self._batch_slots, int(places.context_lengths.max()))
        owners = rows.owners(requests)
        step = Step(
            token_ids=np.array(token_ids, np.int32),
            positions=places.positions,
            query_starts=places.query_starts,
            context_lengths=places.context_lengths,
            block_tables=tables,
            slots=places.slots(tables, self._kv.block_size),
            block_copies=self._kv.take_copies(),
            logits_index=np.array(rows.index, np.int32),
            logits_rows=rows.with_logits,
            draws=draws_of(rows.draws),
            adjustments=adjustments_of(rows.drawn, [draw.position for draw in rows.draws]),
            wants_hidden=owners.want_hidden,
            carried=np.array(carried, np.int32) if carried else NO_PAIRS,
        )
        return PlannedStep(step, owners, self._kv.close_plan())


def adjustments_of(drawn: Sequence[Request], positions: Sequence[int]) -> Adjustments | None:
    """What these requests do to the rows of their tokens at these positions, by the draws."""
    draws, entries = [], []
    for draw, request in enumerate(drawn):
        if request.adjuster is not None:
            draws.append(draw)
            entries.append(_adjustment_or_none_left(request, positions[draw]))
    return gather(draws, entries) if draws else None


def late_mask(request: Request) -> Mask:
    """The mask of a request that was planned when its last token was not known."""
    assert request.adjuster is not None
    if request.state is RequestState.FINISHED:  # nobody wants the token
        return request.adjuster.no_token()
    mask = _adjustment_or_none_left(request, len(request.token_ids)).mask
    assert mask is not None
    return mask


def _adjustment_or_none_left(request: Request, position: int) -> Adjustment:
    """What a request does to its row. Where that fails, it ends, and no other."""
    assert request.adjuster is not None
    try:
        return adjustment_of(request, position)
    except Exception as error:
        return request.adjuster.fail(note_fault("sampling", error))


def adjustment_of(request: Request, position: int) -> Adjustment:
    """What a request with an adjuster does to the row of its token at this position."""
    assert request.adjuster is not None
    return request.adjuster.adjustment(request.token_ids, position)


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
