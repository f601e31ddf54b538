"""Turns: in a round each workload goes to one contestant after the other, the rest stopped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Protocol

from infc.ir.machine import available_memory

from .client import Reply, Worker, WorkerError
from .contestants import Contestant
from .results import START, CeilingSample, Sample, ShapeRun
from .workloads import WAKE_UP, Workload

# Beside twice its weights, what must be free before a worker is loaded: its cache and library.
SPARE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured, and how often. Workloads of many requests come in fewer rounds."""

    workloads: Sequence[Workload]
    rounds: int
    batch_rounds: int
    starts: bool


class Starts(Protocol):
    """Starts contestants; `start.Starter` is the one."""

    def worker(self, contestant: Contestant) -> Worker:
        """A process that loads the contestant's model."""

    def first_token(self, contestant: Contestant) -> Reply:
        """What a fresh process takes."""


class Ceiling(Protocol):
    """Measures what the machine gives; `machine.Ceilings` is the one."""

    def sample(self, round_: int, workload: str) -> CeilingSample:
        """Now."""


@dataclass(slots=True)
class Turns:
    """One shape being measured. Loaded workers stay for all rounds; `save` is called after each."""

    plan: Plan
    run: ShapeRun
    start: Starts
    ceiling: Ceiling
    save: Callable[[], None]
    _workers: dict[str, Worker] = field(default_factory=dict)

    def measure(self, contestants: Sequence[Contestant]) -> None:
        """Load all, run the rounds, end all."""
        with ExitStack() as stack:
            for contestant in contestants:
                self._load(contestant, stack)
            for round_ in range(self.plan.rounds):
                present = [c for c in contestants if c.name in self._workers]
                first = round_ % max(1, len(present))  # nobody always follows the same neighbour
                self._round(round_, present[first:] + present[:first])
                self.save()

    def _load(self, contestant: Contestant, stack: ExitStack) -> None:
        """Load, and run everything once in short: later turns find files and code in memory."""
        _say(f"{self.run.shape} {contestant.name}: loading")
        entrant = self.run.entrants[contestant.name]
        if (free := available_memory()) < 2 * entrant.weight_bytes + SPARE_BYTES:
            del self.run.entrants[contestant.name]
            reason = f"{free / 1e9:.1f} GB of memory are left beside the others: name fewer at once"
            self.run.absent[contestant.name] = reason
            return
        worker = stack.enter_context(self.start.worker(contestant))
        try:
            self.run.entrants[contestant.name] = replace(entrant, version=worker.loaded())
            for workload in self.plan.workloads:
                worker.ask(workload.warm_up)
        except WorkerError as error:
            self._fail(contestant, "loading", error)
            worker.close()
            return
        worker.pause()
        self._workers[contestant.name] = worker

    def _round(self, round_: int, contestants: Sequence[Contestant]) -> None:
        if self.plan.starts:
            for contestant in contestants:
                if round_ == 0 or not contestant.peer.slow_start:
                    self._start(round_, contestant)
        for workload in self.plan.workloads:
            if workload.batch and round_ >= self.plan.batch_rounds:
                continue
            for index, contestant in enumerate(contestants):
                if index in (0, len(contestants) // 2):
                    self._measure_ceiling(round_, workload)
                self._turn(round_, contestant, workload)
            self._measure_ceiling(round_, workload)

    def _measure_ceiling(self, round_: int, workload: Workload) -> None:
        if not workload.batch:
            self.run.ceilings.append(self.ceiling.sample(round_, workload.key))

    def _turn(self, round_: int, contestant: Contestant, workload: Workload) -> None:
        worker = self._workers.get(contestant.name)
        if worker is None:
            return
        worker.resume()
        try:
            worker.ask(WAKE_UP)
            self._keep(round_, contestant, workload.key, worker.ask(workload.draw(round_)))
        except WorkerError as error:
            self._fail(contestant, workload.title, error)
            if not worker.is_alive:
                del self._workers[contestant.name]
        finally:
            worker.pause()

    def _start(self, round_: int, contestant: Contestant) -> None:
        try:
            reply = self.start.first_token(contestant)
        except WorkerError as error:
            self._fail(contestant, START, error)
        else:
            self._keep(round_, contestant, START, reply)

    def _keep(self, round_: int, contestant: Contestant, workload: str, reply: Reply) -> None:
        self.run.samples.append(
            Sample(
                round_,
                contestant.name,
                workload,
                reply.first,
                reply.seconds,
                reply.tokens,
                reply.peak_rss_bytes,
                round(reply.others, 4),
            )
        )
        _say(
            f"round {round_} {self.run.shape} {workload:5} {contestant.name:18}"
            f" {reply.seconds:7.2f} s, {reply.others:.0%} of the CPU taken by others"
        )

    def _fail(self, contestant: Contestant, what: str, error: WorkerError) -> None:
        line = f"{contestant.name}, {what}: {error}"
        self.run.failed.append(line)
        _say(line)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
