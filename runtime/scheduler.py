"""The scheduler: who computes how many tokens in the next step; knows no torch and no tensor."""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from ..ir.errors import CapacityError, RequestError
from .kv_cache import KvCache
from .outputs import FinishReason
from .request import Request, RequestState
from .step import Step

_ORDER = attrgetter("order")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """What one step and the whole scheduler may hold.

    `step_tokens` tokens and `logit_rows` rows of logits a step, `max_sequences` sequences
    running, `max_context` tokens a sequence (prompt and output), `max_waiting` requests queued.
    `compiled_context` is what `max_context` may be raised to without compiling again, where it
    was lowered.
    """

    step_tokens: int
    max_sequences: int
    logit_rows: int
    max_context: int
    max_waiting: int = 4096
    compiled_context: int | None = None

    @property
    def max_running(self) -> int:
        """Sequences that run at once: each gets a token and a row of logits in every step."""
        return min(self.max_sequences, self.logit_rows, self.step_tokens)


class Scheduler:
    """Continuous batching with chunked prefill under one token budget a step.

    Requests are served by `(priority, arrival)`: smaller priority first, then first come. Nobody
    overtakes the head of the queue. When blocks run out the last of that order is preempted: it
    gives its blocks back and is computed again later, from whatever prefix is still cached.
    A running request is never preempted for one that only waits.
    """

    def __init__(self, limits: SchedulerLimits, kv: KvCache) -> None:
        self.limits = limits
        self.kv = kv
        self._waiting: list[Request] = []  # sorted by order
        self._running: list[Request] = []  # sorted by order
        self._requests: dict[str, Request] = {}
        self._in_flight: Step | None = None
        self._ended_in_flight: list[Request] = []
        self._arrivals = 0
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        """Requests that hold no blocks."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that hold blocks."""
        return len(self._running)

    @property
    def has_unfinished(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._requests)

    def get(self, request_id: str) -> Request | None:
        """The unfinished request of that name."""
        return self._requests.get(request_id)

    # --- arrivals and ends --------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises RequestError when it can never be served, CapacityError when the queue is full.
        """
        if request.request_id in self._requests:
            raise RequestError(
                f"request id {request.request_id!r} is in use already", field="request_id"
            )
        request.max_total_tokens = self._max_total_tokens(request)
        if len(self._waiting) >= self.limits.max_waiting:
            raise CapacityError(
                f"{len(self._waiting)} requests are waiting already", hint="try again later"
            )
        self._arrivals += 1
        request.arrival = self._arrivals
        self._requests[request.request_id] = request
        insort(self._waiting, request, key=_ORDER)

    def abort(self, request_id: str) -> Request | None:
        """End a request at any moment, also during its step; None when it is not known."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request, "abort")
        return request

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End an unfinished request and give its blocks back, after its step if it is in one."""
        assert request.state is not RequestState.FINISHED, request.request_id
        del self._requests[request.request_id]
        queue = self._running if request.state is RequestState.RUNNING else self._waiting
        del queue[bisect_left(queue, request.order, key=_ORDER)]
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        request.finished_time = time.monotonic()
        if self._in_flight is not None and request.blocks.seat is not None:
            self._ended_in_flight.append(request)
        else:
            # What led to an error may be damaged: nobody else shall read it.
            self.kv.release(request.blocks, forget=reason == "error")

    # --- steps --------------------------------------------------------------------------------

    def schedule(self) -> Step | None:
        """The next step, None when no request is left. Each must be committed or discarded."""
        assert self._in_flight is None, "the last step was neither committed nor discarded"
        if not self._requests:
            return None
        plan, budget, preempted = self._plan_running()
        if not preempted:
            self._admit(plan, budget)
        assert plan, "requests are left but none can run"
        self._in_flight = self._build(plan)
        return self._in_flight

    def commit(self, step: Step, tokens: Sequence[int | None]) -> None:
        """Take in what `step` gave: one token a row of logits, None where there is no valid one.

        Afterwards each request in `step.sampled` has one token more, and may have finished; those
        aborted since `schedule` are left alone.
        """
        assert step is self._in_flight and len(tokens) == len(step.sampled)
        computed = step.context_lengths.tolist()
        for request, length in zip(step.requests, computed, strict=True):
            if request.state is RequestState.RUNNING:
                request.num_computed = length
                self.kv.advance(request.blocks, request.token_ids, length)
        self._end_step()
        now = time.monotonic()
        for request, token in zip(step.sampled, tokens, strict=True):
            if request.state is RequestState.RUNNING:
                self._append(request, token, now)

    def discard(self, step: Step) -> None:
        """Give up a step that did not run to its end: its requests end with an error.

        What their blocks hold is not known, so none of them can go on.
        """
        assert step is self._in_flight
        self._end_step()
        for request in step.requests:
            if request.state is RequestState.RUNNING:
                self.finish(request, "error")

    def check(self) -> None:
        """Assert that no block, seat or request is lost or has two owners."""
        self.kv.check([r.blocks for r in (*self._running, *self._ended_in_flight)])
        for queue, state in (
            (self._running, RequestState.RUNNING),
            (self._waiting, RequestState.WAITING),
        ):
            assert [r.order for r in queue] == sorted(r.order for r in queue)
            assert all(r.state is state for r in queue)
        assert {r.request_id for r in (*self._running, *self._waiting)} == set(self._requests)
        for request in self._waiting:
            assert request.blocks.seat is None
            assert request.num_computed == 0
        for request in self._running:
            assert 0 <= request.num_computed < len(request.token_ids) < request.max_total_tokens
        assert len(self._running) <= self.limits.max_running

    # --- inside -------------------------------------------------------------------------------

    def _max_total_tokens(self, request: Request) -> int:
        """Prompt and output together; raises RequestError where they can never fit."""
        limit, prompt = self.limits.max_context, request.num_prompt_tokens
        wanted = request.params.max_tokens
        if prompt == 0:
            raise RequestError("the prompt has no tokens", field="prompt")
        if prompt >= limit:
            raise RequestError(
                f"the prompt has {prompt} tokens, and {limit} are all that prompt and output may"
                " have",
                field="prompt",
                hint=f"shorten it, or {self._more_context()}",
            )
        total = limit if wanted is None else prompt + wanted
        if total > limit:
            raise RequestError(
                f"prompt ({prompt}) and max_tokens ({wanted}) are more than {limit} tokens",
                field="max_tokens",
                hint=f"ask for at most {limit - prompt}",
            )
        if not self.kv.holds_alone(total - 1):  # the last token is never read back
            raise RequestError(
                f"{total} tokens are more than the KV cache holds",
                field="max_tokens",
                hint="ask for fewer, or give it more KV memory",
            )
        return total

    def _more_context(self) -> str:
        compiled = self.limits.compiled_context
        if compiled is None or compiled == self.limits.max_context:
            return "compile with a larger runtime.max_context"
        return f"give it more max_context or KV memory: compiled is {compiled}"

    def _plan_running(self) -> tuple[list[tuple[Request, int]], int, bool]:
        """Tokens for each running request, the budget left, and whether one was preempted."""
        plan: list[tuple[Request, int]] = []
        budget = self.limits.step_tokens
        running = self._running
        preempted = False
        while len(plan) < len(running):
            request = running[len(plan)]
            start = request.num_computed
            # One token is kept for each that comes after, so that a long prompt stalls nobody.
            kept = len(running) - len(plan) - 1
            wanted = min(len(request.token_ids) - start, budget - kept)
            count = self.kv.extend(request.blocks, start, wanted)
            if count == 0:
                self._preempt(running.pop())
                preempted = True
                continue
            plan.append((request, count))
            budget -= count
        return plan, budget, preempted

    def _preempt(self, request: Request) -> None:
        self.kv.release(request.blocks)
        request.num_computed = 0
        request.num_preemptions += 1
        request.state = RequestState.WAITING
        self.num_preemptions += 1
        insort(self._waiting, request, key=_ORDER)

    def _admit(self, plan: list[tuple[Request, int]], budget: int) -> None:
        """Start waiting requests while budget, seats and blocks last."""
        now = time.monotonic()
        while self._waiting and budget > 0 and len(self._running) < self.limits.max_running:
            request = self._waiting[0]
            # A free block for each that runs already, or it would soon preempt this one.
            cached = self.kv.admit(request.blocks, request.token_ids, len(self._running))
            if cached is None:
                return
            del self._waiting[0]
            insort(self._running, request, key=_ORDER)
            request.state = RequestState.RUNNING
            request.num_computed = cached
            if request.first_scheduled_time is None:
                request.first_scheduled_time = now
                request.num_cached_tokens = cached
            wanted = min(len(request.token_ids) - cached, budget)
            count = self.kv.extend(request.blocks, cached, wanted)
            assert count > 0, "admitted without room for one token"
            plan.append((request, count))
            budget -= count

    def _build(self, plan: list[tuple[Request, int]]) -> Step:
        """The arrays of the step."""
        size = self.kv.block_size
        token_ids: list[int] = []
        sampled = []
        starts, counts, last_rows = [], [], []
        for request, count in plan:
            start = request.num_computed
            token_ids += request.token_ids[start : start + count]
            starts.append(start)
            counts.append(count)
            if start + count == len(request.token_ids):
                sampled.append(request)
                last_rows.append(len(token_ids) - 1)
        counts_array = np.array(counts, np.int32)
        query_starts = np.zeros(len(plan) + 1, np.int32)
        np.cumsum(counts_array, out=query_starts[1:])
        starts_array = np.array(starts, np.int32)
        sequence = np.repeat(np.arange(len(plan), dtype=np.int32), counts_array)
        rows = np.arange(len(token_ids), dtype=np.int32)
        positions = rows + (starts_array - query_starts[:-1])[sequence]
        tables = self.kv.tables([request.blocks for request, _ in plan])
        index, offset = positions // size, positions % size
        return Step(
            token_ids=np.array(token_ids, np.int32),
            positions=positions,
            query_starts=query_starts,
            context_lengths=starts_array + counts_array,
            block_tables=tables,
            slots=tuple(table[sequence, index] * size + offset for table in tables),
            block_copies=self.kv.take_copies(),
            logits_index=np.array(last_rows, np.int32),
            requests=tuple(request for request, _ in plan),
            sampled=tuple(sampled),
        )

    def _end_step(self) -> None:
        self._in_flight = None
        self.kv.end_step()
        for request in self._ended_in_flight:
            self.kv.release(request.blocks, forget=request.finish_reason == "error")
        self._ended_in_flight = []

    def _append(self, request: Request, token: int | None, now: float) -> None:
        """Add a sampled token, and finish the request if that was its last."""
        if token is None:
            self.finish(request, "error")
            return
        request.token_ids.append(token)
        if request.first_token_time is None:
            request.first_token_time = now
        request.last_token_time = now
        if token in request.end_token_ids:
            request.stop_reason = token
            self.finish(request, "stop")
        elif len(request.token_ids) >= request.max_total_tokens:
            self.finish(request, "length")
