"""Runs a workload on an engine, round after round, and keeps what each step and token took."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ...ir.errors import InfcError
from ...ir.roofline import Roofline, StepShape
from .results import Percentiles, Phase, Spread, WorkloadResult
from .workloads import Workload

if TYPE_CHECKING:
    from ...runtime.engine import Engine
    from ...runtime.executors.base import Executor, Running
    from ...runtime.scheduling.owners import StepTimes
    from ...runtime.scheduling.step import Step


@dataclass(slots=True)
class Round:
    """One round: when each step ended and what it was, when each token of each request came.

    Times are of `perf_counter`; `begun` by request is when it was handed over.
    """

    start: float = 0.0
    stop: float = 0.0
    steps: list[tuple[float, StepShape]] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)
    begun: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, list[float]] = field(default_factory=dict)

    @property
    def all_begun(self) -> float:
        """When the last request had its first token."""
        return max(times[0] for times in self.tokens.values())

    def first_tokens(self) -> list[float]:
        """Seconds of each request to its first token."""
        return [times[0] - self.begun[name] for name, times in self.tokens.items()]

    def gaps(self) -> list[float]:
        """Seconds from each token to the next of its request."""
        return [
            after - before for times in self.tokens.values() for before, after in pairwise(times)
        ]

    def each_token(self) -> list[float]:
        """Mean seconds a token after the first, of each request that has more."""
        return [
            (times[-1] - times[0]) / (len(times) - 1)
            for times in self.tokens.values()
            if len(times) > 1
        ]


class EngineRounds:
    """Measures workloads on one engine, which is its alone as long as it lives."""

    def __init__(self, engine: Engine, roofline: Roofline | None) -> None:
        self._engine, self._roofline = engine, roofline
        self._watched = _WatchedExecutor(engine.executor)
        engine.executor = self._watched
        engine.on_step = self._note_step
        self._round = Round()

    def measure(
        self, workload: Workload, rounds: int, on_round: Callable[[int, int], None]
    ) -> WorkloadResult:
        """The workload's figures, after one round that does not count.

        `on_round(done, all)` is called before each.
        """
        before = self._engine.stats().num_preemptions
        measured = []
        for number in range(rounds + 1):
            on_round(number, rounds + 1)
            one = self._run(workload, number)
            if number:
                measured.append(one)
        result = self._summary(workload, measured)
        result["preemptions"] = self._engine.stats().num_preemptions - before
        return WorkloadResult(workload=workload, rounds=rounds, **result)

    def _run(self, workload: Workload, seed: int) -> Round:
        from ...runtime.sampling.sampling_params import SamplingParams

        engine, one = self._engine, Round()
        params = SamplingParams(max_tokens=workload.new_tokens, ignore_eos=True)
        waiting = deque(enumerate(workload.prompts(seed, engine.vocab_size)))
        under_way = 0
        self._round = one
        one.start = time.perf_counter()
        while waiting or engine.has_unfinished:
            while waiting and under_way < workload.concurrency:
                index, prompt = waiting.popleft()
                name = f"{workload.name}-{seed}-{index}"
                one.begun[name] = time.perf_counter()
                engine.add_request(name, prompt, params)
                under_way += 1
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                if output.error is not None:
                    raise InfcError(f"a request failed: {output.error}")
                new = sum(len(each.token_ids) for each in output.outputs)
                one.tokens.setdefault(output.request_id, []).extend([now] * new)
                under_way -= output.finished
        one.stop = time.perf_counter()
        return one

    def _note_step(self, times: StepTimes) -> None:
        self._round.host_seconds.append(times.seconds - times.executor_seconds)
        self._round.steps.append((time.perf_counter(), self._watched.shapes.popleft()))

    def _summary(self, workload: Workload, rounds: Sequence[Round]) -> dict[str, Any]:
        host = [seconds for one in rounds for seconds in one.host_seconds]
        starts, stops = [r.start for r in rounds], [r.stop for r in rounds]
        all_new = workload.requests * workload.new_tokens
        result: dict[str, Any] = {
            "output": self._phase(rounds, starts, stops, all_new),
            "ttft": Percentiles.of([s for one in rounds for s in one.first_tokens()]),
            "itl": Percentiles.of([s for one in rounds for s in one.gaps()]),
            "tpot": Percentiles.of([s for one in rounds for s in one.each_token()]),
            "steps": statistics.median_low([len(one.steps) for one in rounds]),
            "host_step_microseconds": statistics.median(host) * 1e6,
        }
        at_once = self._engine.plan.limits.max_running
        if workload.requests <= min(workload.concurrency, at_once) and not workload.shared_tokens:
            middles = [one.all_begun for one in rounds]
            prompts = workload.requests * workload.prompt_tokens
            result["prefill"] = self._phase(rounds, starts, middles, prompts)
            if later := workload.requests * (workload.new_tokens - 1):
                result["decode"] = self._phase(rounds, middles, stops, later)
        return result

    def _phase(
        self,
        rounds: Sequence[Round],
        starts: Sequence[float],
        stops: Sequence[float],
        num_tokens: int,
    ) -> Phase:
        spans = list(zip(rounds, starts, stops, strict=True))
        rates = [num_tokens / (stop - start) for _, start, stop in spans]
        shares = [self._needed(*span) / (span[2] - span[1]) for span in spans]
        roofline = None if self._roofline is None else Spread.of(shares)
        return Phase(tokens_per_second=Spread.of(rates), roofline=roofline)

    def _needed(self, one: Round, start: float, stop: float) -> float:
        """What the steps that ended in this part of a round must take, in seconds."""
        if self._roofline is None:
            return 0.0
        inside = (shape for ended, shape in one.steps if start < ended <= stop)
        return sum(self._roofline.step_seconds(shape) for shape in inside)


class _WatchedExecutor:
    """An executor that remembers the shapes of its steps."""

    def __init__(self, inner: Executor) -> None:
        self._inner = inner
        self.depth = inner.depth
        self.shapes: deque[StepShape] = deque()

    def launch(self, step: Step) -> Running:
        running = self._inner.launch(step)
        starts = step.query_starts.tolist()
        queries = (after - before for before, after in pairwise(starts))
        pairs = zip(queries, step.context_lengths.tolist(), strict=True)
        self.shapes.append(StepShape.of(pairs, rows=len(step.logits_index)))
        return running

    def close(self) -> None:
        self._inner.close()
