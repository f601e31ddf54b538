"""Executors around others: they look at steps, change what they return, answer late, or fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from infc.ir.errors import InfcError
from infc.runtime.engine import Engine
from infc.runtime.executors.base import Executor, Running
from infc.runtime.sampling.adjustments import Mask
from infc.runtime.scheduling.owners import StepOwners
from infc.runtime.scheduling.step import Step, StepOutput

from .paged_model import PagedModel


class Wrapped:
    """Does what the executor inside does, but does not close it."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner
        self.depth = inner.depth

    def launch(self, step: Step) -> Running:
        return self.inner.launch(step)

    def close(self) -> None: ...


def owners_in_flight(engine: Engine) -> StepOwners:
    """Whose step the engine launches at the moment."""
    return engine.scheduler._in_flight[-1].owners


Course = Literal["early", "late", "refused", "fails"]
"""When a step is computed: as it is launched, or when its result is asked for; or whether it is
refused as it is launched, or fails later."""


@dataclass(eq=False)
class LateStep:
    """A step of `LateExecutor`, which `result` computes with all those before it."""

    executor: LateExecutor
    step: Step
    fails: bool
    output: StepOutput | None = None
    awaits_masks: bool = False

    def result(self) -> StepOutput:
        self.executor.run_until(self)
        if self.fails:
            self.executor.fail_queued()
            raise InfcError("the step failed")
        assert self.output is not None
        return self.output


class LateExecutor(Wrapped):
    """Takes steps while others run, and answers when `course` says, which is asked for each step.

    Steps that run behind one that fails, or are launched before anybody knows, fail as well.
    """

    def __init__(
        self, inner: Executor, depth: int = 1, course: Callable[[], Course] = lambda: "late"
    ) -> None:
        super().__init__(inner)
        self.depth, self.course = depth, course
        self.queue: list[LateStep] = []
        self.num_launched = 0
        self.is_broken = False

    def launch(self, step: Step) -> LateStep:
        assert len(self.queue) <= self.depth
        course = self.course()
        if course == "refused":
            raise InfcError("the step was refused")
        num_late = 0 if step.adjustments is None else step.adjustments.num_late
        running = LateStep(self, step, course == "fails", awaits_masks=num_late > 0)
        self.queue.append(running)
        self.num_launched += 1
        if course == "early" and not self.awaits_masks:
            self.run_until(running)
        return running

    @property
    def awaits_masks(self) -> bool:
        """Whether a step cannot be computed yet."""
        return any(each.awaits_masks for each in self.queue)

    def fail_queued(self) -> None:
        """Somebody knows now that a step failed: those behind it are the last that do."""
        for each in self.queue:
            each.fails = True
        self.is_broken = False

    def run_until(self, last: LateStep) -> None:
        """Compute what is in the queue up to this step."""
        while last in self.queue:
            each = self.queue.pop(0)
            assert not each.awaits_masks, "nobody gave its masks"
            each.fails = each.fails or self.is_broken
            self.is_broken = each.fails
            if not each.fails:
                each.output = self.inner.launch(each.step).result()
            elif isinstance(self.inner, PagedModel):
                self.inner.spoil(each.step)


class MaskedLateExecutor(LateExecutor):
    """One whose steps may be launched before their masks are known."""

    num_late = 0

    def give_masks(self, running: Running, masks: Mask) -> None:
        assert isinstance(running, LateStep) and running.awaits_masks
        assert running in self.queue
        adjustments = running.step.adjustments
        assert adjustments is not None
        running.step = replace(running.step, adjustments=adjustments.with_late(masks))
        running.awaits_masks = False
        self.num_late += len(masks)
