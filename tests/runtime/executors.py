"""Executors around others, for tests that look at steps, change what they return, or fail them."""

from __future__ import annotations

from infc.runtime.engine import Engine
from infc.runtime.executors.base import Executor, Running
from infc.runtime.scheduling.owners import StepOwners
from infc.runtime.scheduling.step import Step


class Wrapped:
    """Does what the executor inside does, but does not close it."""

    def __init__(self, inner: Executor) -> None:
        self.inner = inner

    def launch(self, step: Step) -> Running:
        return self.inner.launch(step)

    def close(self) -> None: ...


def owners_in_flight(engine: Engine) -> StepOwners:
    """Whose step the engine launches at the moment."""
    planned = engine.scheduler._in_flight
    assert planned is not None
    return planned.owners
