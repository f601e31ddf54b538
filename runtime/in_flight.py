"""The steps that an executor was given and whose results have not been taken in."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from .executors.base import Executor, Running, TakesLateMasks
from .sampling.adjustments import Mask
from .scheduling.owners import PlannedStep
from .scheduling.step import StepOutput
from .scheduling.step_builder import late_mask


@dataclass(slots=True, eq=False)
class Flight:
    """A step in flight: planned at `begun`, and the seconds that the executor was waited for.

    `awaits_masks` while it runs and masks are to be given to its `executor`.
    """

    planned: PlannedStep
    begun: float
    running: Running | None = None
    executor: Executor | None = None
    executor_seconds: float = 0.0
    awaits_masks: bool = False
    fault: Exception | None = None

    def launch(self, executor: Executor) -> None:
        """Give the step to the executor. Raises what that raises."""
        begun = time.perf_counter()
        self.running, self.executor = executor.launch(self.planned.step), executor
        self.executor_seconds = time.perf_counter() - begun
        adjustments = self.planned.step.adjustments
        self.awaits_masks = adjustments is not None and adjustments.num_late > 0

    def give_masks(self) -> None:
        """Give the masks that come late, now that their tokens are known. Raises nothing."""
        if self.awaits_masks:
            try:
                self._give([late_mask(request) for request in self.planned.late_masks()])
            except Exception as error:
                self.fault = error

    def result(self) -> StepOutput:
        """Wait for the step; what it returned, or raised."""
        assert self.running is not None
        if self.fault is not None:
            self.release()
            raise self.fault
        begun = time.perf_counter()
        output = self.running.result()
        self.executor_seconds += time.perf_counter() - begun
        return output

    def drain(self) -> None:
        """Wait for a step whose result is not wanted."""
        if self.running is not None:
            self.release()
            with contextlib.suppress(Exception):
                self.running.result()

    def release(self) -> None:
        """Let the step end whose masks nobody will know."""
        if self.awaits_masks:
            waiting = self.planned.late_masks()
            with contextlib.suppress(Exception):
                self._give([request.adjuster.no_token() for request in waiting if request.adjuster])

    def _give(self, masks: list[Mask]) -> None:
        assert self.running is not None and isinstance(self.executor, TakesLateMasks)
        self.awaits_masks = False
        self.executor.give_masks(self.running, np.stack(masks))


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

    def late_masks(self, executor: Executor) -> bool:
        """Whether the next step may be launched before all of its masks are known."""
        return len(self._flights) > 0 and isinstance(executor, TakesLateMasks)

    def end_first(self) -> None:
        """Forget the first step, which is settled, and give the next one masks that follow."""
        self._flights.popleft()
        if self._flights:
            self.first.give_masks()

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
        for flight in self._flights:
            flight.release()
        self._flights.clear()

    def seconds_of(self, flight: Flight) -> float:
        """What a step took whose results have just been told: less what others had beside it."""
        begun, self._ended = max(flight.begun, self._ended), time.perf_counter()
        return self._ended - begun
