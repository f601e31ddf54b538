"""The scheduler: who computes how many tokens in the next step; knows no torch and no tensor."""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections.abc import Sequence
from operator import attrgetter

from ...ir.errors import CapacityError, RequestError
from ...ir.sizes import format_count
from ..requests.outputs import FinishReason
from ..requests.request import Request, RequestState
from .admission import SchedulerLimits, max_total_tokens
from .demand import Demand
from .kv_cache import Headroom, KvCache
from .owners import PlannedStep
from .pacing import Pacer
from .step_builder import RowBudget, StepBuilder

_ORDER = attrgetter("order")


class Scheduler:
    """Continuous batching with chunked prefill under one token budget a step.

    Requests are served by `(priority, arrival)`: smaller priority first, then first come. Nobody
    overtakes the head of the queue. When blocks run out the last of that order is preempted: it
    gives its blocks back and is computed again later, from whatever prefix is still cached.
    A running request is never preempted for one that only waits, and nobody is admitted as long
    as those that run are expected to need the blocks (`Demand`); beside nobody, anybody is.

    Requests that arrive together compute a prefix that they share once. Who is admitted finds
    also the blocks that those before it in the very same step are about to write. As budget is
    left for the queue only once all that run have what they want, nobody has to wait for blocks
    of a later step, and the order stays as it is. (Rows of logits can bound a prompt as well; who
    is admitted beside such a one goes on from where the step leaves it.)

    A request of several choices is admitted with a batch slot and a block for each. Its first
    choice computes the prompt; then the others share its blocks, and each goes on as a sequence of
    its own: preempted, finished and counted alone.
    """

    def __init__(self, limits: SchedulerLimits, kv: KvCache) -> None:
        self.limits = limits
        self.kv = kv
        self._builder = StepBuilder(kv)
        self._waiting: list[Request] = []  # sorted by order
        self._running: list[Request] = []  # sorted by order
        self._requests: dict[str, list[Request]] = {}  # the unfinished choices of each
        self._in_flight: list[PlannedStep] = []  # in the order in which they run
        # Who ended, and the last step that uses their blocks.
        self._ended_in_flight: list[tuple[Request, PlannedStep]] = []
        self._drains = False  # whether nothing is planned before all in flight are settled
        self._arrivals = 0
        self._demand = Demand(kv.block_size)
        target = limits.itl_target_seconds
        self._pacer = None if target is None else Pacer(target)
        self.num_preemptions = 0
        self.token_gaps: dict[float, int] = {}
        """Of the last step that was settled: see `StepTimes`."""

    @property
    def num_waiting(self) -> int:
        """Sequences that hold no blocks."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._running)

    @property
    def has_unfinished(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._requests)

    def get(self, request_id: str) -> Request | None:
        """The first unfinished choice of the request of that name."""
        choices = self._requests.get(request_id)
        return choices[0] if choices else None

    # --- arrivals and ends --------------------------------------------------------------------

    @property
    def num_queued(self) -> int:
        """Requests that wait; further choices of one that runs are no requests of their own."""
        return sum(waiting.is_lead for waiting in self._waiting)

    def check_fits(self, request: Request) -> int:
        """The tokens that it may have; RequestError where it can never be served; on any thread."""
        return max_total_tokens(request, self.limits, self.kv)

    def add(self, request: Request, *others: Request) -> None:
        """Queue a request. Whatever is raised, it is queued with all of its choices, or not at all.

        Of one that is resumed, these are the choices that have not ended: each is computed as if
        it had been preempted. Raises RequestError when it can never be served, CapacityError when
        the queue is full.
        """
        if request.request_id in self._requests:
            raise RequestError(
                f"request id {request.request_id!r} is already in use", field="request_id"
            )
        total = max_total_tokens(request, self.limits, self.kv)
        if self.num_queued >= self.limits.max_waiting:
            raise CapacityError(
                f"{format_count(self.num_queued, 'request')} already waiting",
                hint="try again later",
            )
        self._arrivals += 1
        request.make_choices()
        choices = [request, *request.unforked, *others]
        for choice in choices:
            choice.arrival, choice.max_total_tokens = self._arrivals, total
        try:
            self._requests[request.request_id] = choices
            for each in (request, *others):
                insort(self._waiting, each, key=_ORDER)
        except BaseException:  # one that is only known would never run, and never end
            self._requests.pop(request.request_id, None)
            for each in (request, *others):
                if each in self._waiting:
                    self._waiting.remove(each)
            raise

    def take_over(self, other: Scheduler) -> None:
        """Begin anew with the requests of one that failed as it was to make a step.

        Whatever it left of its blocks: the requests are computed again, as the preempted are.
        """
        self._arrivals, self.num_preemptions = other._arrivals, other.num_preemptions
        self._requests, self._demand = other._requests, other._demand
        queued = [request for choices in self._requests.values() for request in choices]
        for request in queued:
            request.restart()
        waiting = (request for request in queued if request.state is RequestState.WAITING)
        self._waiting = sorted(waiting, key=_ORDER)

    def abort(self, request_id: str, reason: FinishReason = "abort") -> list[Request]:
        """End all choices of a request at any moment, also during its step.

        Gives those that had not ended; none where the request is not known.
        """
        choices = list(self._requests.get(request_id, ()))
        for request in choices:
            self.finish(request, reason)
        return choices

    def finish(self, request: Request, reason: FinishReason) -> None:
        """End one choice and give its blocks back, once no step that it is in is in flight."""
        assert request.state is not RequestState.FINISHED, request.request_id
        self._forget(request)
        if request.state is not RequestState.UNFORKED:
            queue = self._running if request.state is RequestState.RUNNING else self._waiting
            del queue[bisect_left(queue, request.order, key=_ORDER)]
        request.state = RequestState.FINISHED
        request.finish_reason = reason
        is_answer = reason in ("stop", "length") and not request.is_read_only
        self._demand.note_end(request.num_output_tokens if is_answer else None)
        request.finished_time = time.monotonic()
        steps = [each for each in self._in_flight if request in each.owners.requests]
        if steps:
            self._ended_in_flight.append((request, steps[-1]))
        else:
            # What led to an error may be damaged: nobody else shall read it.
            self.kv.release(request.blocks, forget=reason == "error")

    # --- steps --------------------------------------------------------------------------------

    def schedule(self, *, late_masks: bool = False) -> PlannedStep | None:
        """The next step, which is in flight until it is settled or discarded.

        It may be planned while earlier ones are in flight: what each request computes follows from
        lengths, and the values come with `settle`. With `late_masks`, masks that follow from
        values may come while the step runs (`PlannedStep.late_masks`). None when no request is
        left, or none can go on before a step in flight is settled.
        """
        ahead = bool(self._in_flight)
        if not self._requests or (ahead and self._drains):
            return None
        self._drains = False
        rows = RowBudget(self.limits.logit_rows, len(self._running))
        plan, budget, is_short = self._plan_running(rows, ahead, late_masks)
        if not is_short:
            self._admit(plan, budget, rows)
        if not plan:
            assert ahead, "requests are left but none can run"
            return None
        planned = self._builder.build(plan)
        self._in_flight.append(planned)
        for request, count in plan:
            request.num_computed += count
        return planned

    def settle(self, planned: PlannedStep, runs: Sequence[Sequence[int] | None]) -> None:
        """Take in what the earliest step in flight gave, which has run.

        `runs` has one entry for each that it sampled: the tokens that follow, None for no valid
        one. Afterwards each of them has these tokens, and may have finished. Those that ended
        since `schedule` are left alone: what was computed for them is dropped.
        """
        assert planned is self._in_flight[0] and len(runs) == len(planned.owners.sampled)
        del self._in_flight[0]
        owners, now = planned.owners, time.monotonic()
        lengths = planned.step.context_lengths.tolist()
        # Blocks whose tokens were not known when the step was planned are found from now on.
        fills, forked = len(planned.step.carried) > 0, []
        for request, length in zip(owners.requests, lengths, strict=True):
            if request.state is RequestState.RUNNING:
                if fills:
                    self.kv.register(request.blocks, request.token_ids, length)
                if self.kv.frees_early:
                    self.kv.advance(request.blocks, length)
                if request.unforked and length >= request.num_prompt_tokens:
                    forked.append(request)
        for rows in owners.prompt_rows:
            given = rows.first_position + rows.count
            rows.request.num_prompt_rows = max(rows.request.num_prompt_rows, given)
        self.kv.end_step(planned.blocks)
        if self._ended_in_flight:
            self._release_ended()
        for request in forked:
            self._fork(request, now)
        self.token_gaps = {}
        for request, run in zip(owners.sampled, runs, strict=True):
            if request.state is not RequestState.FINISHED:
                self._append(request, run, now)

    def observe(self, planned: PlannedStep, seconds: float) -> None:
        """Take in what a step took from its beginning to what it gave."""
        if self._pacer is not None:
            step = planned.step
            self._pacer.observe(step.num_sequences, step.num_tokens, seconds)

    def discard(self, planned: PlannedStep) -> list[Request]:
        """Give up a step in flight that did not run to its end, and those launched after it.

        Its requests end with an error: what their blocks hold is not known, so none of them can go
        on; nor do other choices. Gives those that ended. Whoever is only in a later step may have
        read what was never written, and is computed again, as the preempted are. No step in flight
        may still run but those before this one.
        """
        at = self._in_flight.index(planned)
        void = self._in_flight[at:]
        del self._in_flight[at:]
        for each in void:
            self.kv.end_step(each.blocks, written=False)
        self._builder.forget()
        self._drains = True  # the draws that would be carried over may be of a void step
        ended = []
        for request in planned.owners.requests:
            # The name of one that ended before may be another's by now.
            if request.state is not RequestState.FINISHED:
                ended += self.abort(request.request_id, "error")
        for each in void[1:]:
            for request in each.owners.requests:
                if request.state is RequestState.RUNNING:
                    self._running.remove(request)
                    self._preempt(request)
        self._release_ended()
        return ended

    def check(self) -> None:
        """Assert that no block, batch slot or request is lost or has two owners."""
        ended = [request for request, _ in self._ended_in_flight]
        self.kv.check([r.blocks for r in (*self._running, *ended)])
        for queue, state in (
            (self._running, RequestState.RUNNING),
            (self._waiting, RequestState.WAITING),
        ):
            assert [r.order for r in queue] == sorted(r.order for r in queue)
            assert all(r.state is state for r in queue)
        queued = [*self._running, *self._waiting]
        queued += [twin for r in queued for twin in r.unforked]
        known = [request for choices in self._requests.values() for request in choices]
        assert {id(r) for r in queued} == {id(r) for r in known}, "a choice is lost"
        assert len(queued) == len(known)
        for request in queued:
            assert all(twin.state is RequestState.UNFORKED for twin in request.unforked)
            assert not request.unforked or not request.num_output_tokens, "not forked in time"
        for request in self._waiting:
            assert request.blocks.batch_slot is None
            assert request.num_computed == 0
        for request in self._running:
            in_flight = sum(request in planned.owners.requests for planned in self._in_flight)
            assert 0 <= request.num_computed < len(request.token_ids) + in_flight
            assert len(request.token_ids) + (not request.is_read_only) <= request.max_total_tokens
            last = max(request.num_prompt_tokens, request.max_total_tokens - 1)
            assert request.num_computed <= last, "the last token is computed"
        assert len(self._running) <= self.limits.max_running

    # --- inside -------------------------------------------------------------------------------

    def _forget(self, request: Request) -> None:
        choices = self._requests[request.request_id]
        choices.remove(request)
        if not choices:
            del self._requests[request.request_id]

    def _plan_running(
        self, rows: RowBudget, ahead: bool, late_masks: bool
    ) -> tuple[list[tuple[Request, int]], int, bool]:
        """Tokens for each running request, the budget left, and whether blocks ran short."""
        plan: list[tuple[Request, int]] = []
        budget = self._budget()
        running = self._running
        is_short, place = False, 0
        while place < len(running):
            request = running[place]
            if ahead and not self._can_go_on(request, late_masks):
                place += 1
                continue
            # One token is kept for each that comes after, so that a long prompt stalls nobody.
            count = self._extend(request, budget - (len(running) - place - 1), rows)
            if count == 0:
                is_short = True
                if ahead:  # whoever would be preempted is in a step that runs
                    self._drains = True
                    break
                self._preempt(running.pop())
                continue
            plan.append((request, count))
            budget -= count
            place += 1
        return plan, budget, is_short

    def _can_go_on(self, request: Request, late_masks: bool) -> bool:
        """Whether its next token can be computed while steps are in flight."""
        if request.num_computed < len(request.token_ids):
            return True
        # Who was left out of the last step has a token that comes from an earlier one.
        is_carried = request.adjuster is None or self._builder.draws(request)
        return is_carried and request.can_go_on(late_masks=late_masks)

    def _budget(self) -> int:
        """Tokens of the next step: fewer than the limit where somebody waits for a next token."""
        most = self.limits.step_tokens
        if self._pacer is None or not any(r.num_output_tokens for r in self._running):
            return most
        return self._pacer.budget(len(self._running), most)

    def _extend(self, request: Request, budget: int, rows: RowBudget) -> int:
        """Let the request compute what budget, rows and blocks allow; how many tokens that is."""
        tokens, start = request.token_ids, request.num_computed
        known = len(tokens) - start
        wanted = min(known if known > 0 else 1, budget)  # 1 for a token that a step draws
        # As for most tokens of an answer: it has room for them, and a row each.
        if start >= request.num_prompt_tokens and start + wanted < request.blocks.steady_tokens:
            return wanted
        if not request.wants_prompt_rows:
            return self.kv.extend(request.blocks, tokens, start, wanted)
        wanted = min(wanted, rows.most_tokens(request))
        count = self.kv.extend(request.blocks, tokens, start, wanted)
        rows.take(request, count)
        return count

    def _preempt(self, request: Request) -> None:
        self.kv.release(request.blocks)
        self._demand.note_end(None)
        request.num_computed = 0
        request.num_preemptions += 1
        request.state = RequestState.WAITING
        self.num_preemptions += 1
        insort(self._waiting, request, key=_ORDER)

    def _admit(self, plan: list[tuple[Request, int]], budget: int, rows: RowBudget) -> None:
        """Start waiting requests while budget, rows, slots and blocks last."""
        now = time.monotonic()
        # Those that run, and the choices that will once their prompt has been computed.
        expected = len(self._running) + sum(len(r.unforked) for r in self._running)
        while self._waiting and budget > 0 and rows.spare > 0:
            slots = self.limits.max_running - expected
            if slots <= 0:
                return
            request = self._waiting[0]
            # Choices without a batch slot wait for one when they are forked: nobody waits for all
            # of them at once. Unless each of them would have to compute the prompt again.
            demand = 1 + len(request.unforked)
            if demand > slots and expected and not self.kv.prefix_reuse:
                return
            demand = min(demand, slots)
            # Without room for those that run or will, they would soon preempt this one.
            headroom = self._headroom(request, expected, demand)
            cached = self.kv.admit(
                request.blocks, request.token_ids, headroom, request.reusable_tokens
            )
            if cached is None:
                return
            del self._waiting[0]
            self._start(request, cached, now)
            if request.num_preemptions == 0:
                request.num_cached_tokens = cached
            rows.spare -= 1
            count = self._extend(request, budget, rows)
            assert count > 0, "admitted without room for one token"
            plan.append((request, count))
            budget -= count
            expected += demand

    def _headroom(self, newcomer: Request, expected: int, demand: int) -> Headroom:
        """What stays free for the `expected` others, and for `demand` choices of a newcomer."""
        if not expected:
            return Headroom()
        if self.kv.has_one_block_each:  # only choices need more: each copies the block they share
            copies = demand if demand > 1 else 0
            for request in self._running:
                if request.unforked:
                    copies += 1 + len(request.unforked)
                else:
                    copies += self.kv.copies_next(request.blocks)
            return Headroom(copies)
        growth = self._demand.blocks_beside(self._running, newcomer, demand)
        return Headroom(expected + demand - 1, growth)

    def _start(self, request: Request, num_computed: int, now: float) -> None:
        """Let a request that has its blocks run."""
        insort(self._running, request, key=_ORDER)
        request.state = RequestState.RUNNING
        request.num_computed = num_computed
        if request.first_scheduled_time is None:
            request.first_scheduled_time = now

    def _fork(self, request: Request, now: float) -> None:
        """Let the other choices go on from the prompt, which `request` has computed.

        Those without a batch slot wait for one, and find the prompt's blocks as a cached prefix.
        """
        twins, request.unforked = request.unforked, []
        for twin in twins:
            free = len(self._running) < self.limits.max_running
            if free and self.kv.fork(request.blocks, twin.blocks):
                self._start(twin, request.num_computed, now)
            else:
                twin.state = RequestState.WAITING
                insort(self._waiting, twin, key=_ORDER)

    def _release_ended(self) -> None:
        """Give back the blocks of those that ended in flight, and no longer are."""
        ended, self._ended_in_flight = self._ended_in_flight, []
        for request, last in ended:
            if last in self._in_flight:
                self._ended_in_flight.append((request, last))
            else:
                self.kv.release(request.blocks, forget=request.finish_reason == "error")

    def _append(self, request: Request, run: Sequence[int] | None, now: float) -> None:
        """Add tokens that a step gave, and finish the request where one is its last."""
        if run is None:
            self.finish(request, "error")
            return
        if request.is_read_only:
            self.finish(request, "length")
            return
        if (before := request.last_token_time) is None:
            request.first_token_time = now
        else:
            gap, gaps = (now - before) / len(run), self.token_gaps
            gaps[gap] = gaps.get(gap, 0) + len(run)
        request.last_token_time = now
        token_ids = request.token_ids
        for token in run:
            token_ids.append(token)
            if token in request.end_token_ids:
                request.stop_reason = request.stop_texts.get(token, token)
                self.finish(request, "stop")
                return
            if len(token_ids) >= request.max_total_tokens:
                self.finish(request, "length")
                return
