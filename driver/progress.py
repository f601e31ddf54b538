"""How a long command says what it is doing: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..ir.errors import UsageError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Reporter:
    """Hears about stages, their advance, and remarks; this one keeps quiet and takes the times."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Brackets one stage of the work; its wall time lands in `seconds`."""
        start = time.perf_counter()
        self._begin(name)
        finished = False
        try:
            yield
            finished = True
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self._end(name, finished)

    def advance(self, done: int, total: int, detail: str = "") -> None:
        """Says how far the present stage is, in units of its own, and with what it is busy."""

    def remark(self, text: str) -> None:
        """Says one thing that the user should know."""

    def _begin(self, name: str) -> None: ...

    def _end(self, name: str, finished: bool) -> None: ...


LINE_INTERVAL_S = 15.0
"""How long a stage goes on before a line says how far it is, and after each such line."""


class LineReporter(Reporter):
    """One line on stderr for each finished stage and each remark.

    Of a stage that takes long there are more, each with what was really done.
    """

    def __init__(self) -> None:
        super().__init__()
        self._name = ""
        self._said = 0.0

    def advance(self, done: int, total: int, detail: str = "") -> None:
        """Prints how far the stage is, where nothing was printed for some time."""
        now = time.perf_counter()
        if self._name and now - self._said >= LINE_INTERVAL_S:
            self._said = now
            parts = [f"{100 * done // total} %" if total else "", detail]
            self.remark(f"{self._name}: {', '.join(part for part in parts if part)}")

    def remark(self, text: str) -> None:
        """Prints the remark."""
        print(text, file=sys.stderr, flush=True)

    def _begin(self, name: str) -> None:
        self._name, self._said = name, time.perf_counter()

    def _end(self, name: str, finished: bool) -> None:
        self._name = ""
        if finished:
            self.remark(f"{name}: {self.seconds[name]:.1f} s")


class LiveReporter(Reporter):
    """A line that moves, on a terminal; finished stages stay with their time."""

    def __init__(self) -> None:
        super().__init__()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._name = ""

    def remark(self, text: str) -> None:
        """Prints the remark above the moving line."""
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        else:
            print(text, file=sys.stderr)

    def advance(self, done: int, total: int, detail: str = "") -> None:
        """Moves the bar of the present stage."""
        if self._progress is not None and self._task is not None:
            text = f"{self._name}: {detail}" if detail else self._name
            self._progress.update(self._task, completed=done, total=total, description=text)

    def _begin(self, name: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TimeElapsedColumn

        console = Console(stderr=True)
        columns = (SpinnerColumn(), "{task.description}", BarColumn(24), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True)
        self._progress.start()
        self._name = name
        self._task = self._progress.add_task(name, total=None)

    def _end(self, name: str, finished: bool) -> None:
        assert self._progress is not None
        self._progress.stop()
        self._progress = None
        if finished:
            print(f"  {name}: {self.seconds[name]:.1f} s", file=sys.stderr)


def as_reporter(progress: Reporter | bool) -> Reporter:
    """What a `progress` argument means: True for lines on stderr, False for none, or a reporter.

    Raises UsageError for anything else.
    """
    if isinstance(progress, Reporter):
        return progress
    if not isinstance(progress, bool):
        raise UsageError(
            f"progress is {progress!r}", hint="use True, False or an infc.driver.progress.Reporter"
        )
    return LineReporter() if progress else Reporter()


def make_reporter(quiet: bool) -> Reporter:
    """The reporter that suits stderr."""
    if quiet:
        return Reporter()
    return LiveReporter() if sys.stderr.isatty() else LineReporter()
