"""How long the GPU waits for the host between the steps of a decode."""

from __future__ import annotations

from typing import Any

from infc.runtime.executors.gpu.driver import Bytes, Driver

from .setting import Results, Setting
from .stepping import decode
from .steps import Workload, open_executor


class MarkedDriver:
    """A driver that has an event before the first launch of each step, and one after the last."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._capturing = self._running = False
        self.marks: list[tuple[object, object]] = []
        self._begun: object = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._driver, name)

    def begin_capture(self) -> None:
        """As the driver does; what is captured does not run."""
        self._capturing = True
        self._driver.begin_capture()

    def end_capture(self) -> object:
        """As the driver does."""
        self._capturing = False
        return self._driver.end_capture()

    def launch(self, *call: Any, **options: Any) -> None:
        """As the driver does."""
        self._begin()
        self._driver.launch(*call, **options)

    def replay(self, graph: object) -> None:
        """As the driver does."""
        self._begin()
        self._driver.replay(graph)

    def download(self, target: Bytes, address: int) -> None:
        """As the driver does: results are downloaded when all has been launched."""
        if self._running:
            self._running = False
            self.marks.append((self._begun, self._driver.record_event(timed=True)))
        self._driver.download(target, address)

    def _begin(self) -> None:
        if not self._capturing and not self._running:
            self._running = True
            self._begun = self._driver.record_event(timed=True)


def measure_idle(setting: Setting, workload: Workload) -> Results:
    """Microseconds of a decode step, those in which launches run, and the share of the others.

    Events take time of the host themselves: without them, the share is smaller.
    """
    artifact = workload.artifact(setting)
    shape = workload.decodes[0]
    driver = MarkedDriver(setting.new_driver())
    executor = open_executor(setting, artifact, [shape], (), driver=driver)
    decode(executor, artifact.manifest.main.resources, *shape, setting.num_steps)
    marks = driver.marks[-setting.num_steps :]
    busy = sum(driver.seconds_between(*mark) for mark in marks) / len(marks)
    span = driver.seconds_between(marks[0][0], marks[-1][0]) / max(1, len(marks) - 1)
    executor.close()
    return {
        "idle": {
            "step µs": round(span * 1e6, 1),
            "launches µs": round(busy * 1e6, 1),
            "share": round(max(0.0, 1 - busy / span), 3),
        }
    }
