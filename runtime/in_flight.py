"""The steps that an executor was given and whose results have not been taken in."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from dataclasses import dataclass

from .executors.base import Executor, Running
from .scheduling.owners import PlannedStep
from .scheduling.step import StepOutput


@dataclass(slots=True, eq=False)
class Flight:
    """A step in flight: planned at `begun`, and the seconds that the executor was waited for."""

    planned: PlannedStep
    begun: float
    running: Running | None = None
    executor_seconds: float = 0.0

    def launch(self, executor: Executor) -> None:
        """Give the step to the executor. Raises what that raises."""
        begun = time.perf_counter()
        self.running = executor.launch(self.planned.step)
        self.executor_seconds = time.perf_counter() - begun

    def result(self) -> StepOutput:
        """Wait for the step; what it returned, or raised."""
        assert self.running is not None
        begun = time.perf_counter()
        output = self.running.result()
        self.executor_seconds += time.perf_counter() - begun
        return output

    def drain(self) -> None:
        """Wait for a step whose result is not wanted."""
        if self.running is not None:
            with contextlib.suppress(Exception):
                self.running.result()


class StepsInFlight:
    """Steps in the order in which they run."""

    def __init__(self) -> None:
        self._flights: deque[Flight] = deque()
        self._ended = 0.0

    def __len__(self) -> int:
        return len(self._flights)

    @property
    def first(self) -> Flight:
        """The step that runs first."""
        return self._flights[0]

    def add(self, planned: PlannedStep, begun: float) -> Flight:
        """Note a step that is about to be launched."""
        flight = Flight(planned, begun)
        self._flights.append(flight)
        return flight

    def take_first(self) -> Flight:
        """Forget the first step, whose result has been taken."""
        return self._flights.popleft()

    def give_up(self, flight: Flight) -> None:
        """Forget a step that failed and those after it, once none of these runs any more."""
        while (last := self._flights[-1]) is not flight:
            last.drain()
            self._flights.pop()
        self._flights.pop()

    def drain(self) -> None:
        """Forget all steps, once none of them runs any more."""
        for flight in self._flights:
            flight.drain()
        self.forget()

    def forget(self) -> None:
        """Forget all steps, which may still run."""
        self._flights.clear()

    def seconds_of(self, flight: Flight) -> float:
        """What a step took whose results have just been told: less what others had beside it."""
        begun, self._ended = max(flight.begun, self._ended), time.perf_counter()
        return self._ended - begun
