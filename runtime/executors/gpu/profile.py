"""What each launch of a step takes, measured on the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from ..base import ProfileEntry
from .arrays import Layout
from .driver import Driver
from .launching import ReadyForm, ReadyLaunch, Sizes

_REPEATS: Final = 8
"""A launch is repeated so often, in a graph: by itself, most of the time would be the host's. It
reads nothing that it writes, so what it gives is the same."""


@dataclass(slots=True)
class _Line:
    """The time of one launch in all steps so far."""

    name: str
    nodes: tuple[str, ...]
    seconds: float = 0.0
    count: int = 0


@dataclass(slots=True)
class _Timed:
    line: _Line
    before: object
    after: object


@dataclass(slots=True)
class GpuProfile:
    """The launches of all forms, in the order of a step, with what each took."""

    _lines: dict[int, _Line] = field(default_factory=dict)
    _graphs: dict[tuple[int, tuple[int, ...]], object] = field(default_factory=dict)
    _timed: list[_Timed] = field(default_factory=list)

    @classmethod
    def of(cls, forms: Iterable[ReadyForm]) -> GpuProfile:
        """The profile of these forms; nothing has been measured."""
        profile = cls()
        for form in forms:
            for one in form.launches:
                profile._lines[id(one)] = _Line(f"{form.form.name} {one.entry}", one.nodes)
        return profile

    def run(
        self, driver: Driver, launches: Sequence[ReadyLaunch], sizes: Sizes, layout: Layout
    ) -> None:
        """Carry out launches, one after the other, each with events around it."""
        for one in launches:
            call = one.call(sizes, layout)
            if call is None:
                continue
            key = id(one), tuple([sizes[name] for name in sorted(one.sizes)])
            if key not in self._graphs:
                function, grid, parameters, _ = call
                driver.begin_capture()
                for _ in range(_REPEATS):
                    driver.launch(function, grid, parameters)
                self._graphs[key] = driver.end_capture()
            before = driver.record_event(timed=True)
            driver.replay(self._graphs[key])
            after = driver.record_event(timed=True)
            self._timed.append(_Timed(self._lines[id(one)], before, after))

    def entries(self, driver: Driver) -> list[ProfileEntry]:
        """The entries with what steps took until now; waits for those that run."""
        if self._timed:
            driver.wait(self._timed[-1].after)
        for timed in self._timed:
            seconds = driver.seconds_between(timed.before, timed.after)
            timed.line.seconds += seconds / _REPEATS
            timed.line.count += 1
        self._timed.clear()
        return [
            ProfileEntry(line.name, line.nodes, round(line.seconds * 1e9), line.count)
            for line in self._lines.values()
        ]
