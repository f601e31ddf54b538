"""A bar of finished requests on stderr, where somebody looks at it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class ProgressBar:
    """Counts finished requests; shows nothing where it is off, or stderr is no terminal."""

    def __init__(self, title: str, total: int, *, on: bool) -> None:
        self._title = title
        self._total = total
        self._on = on
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressBar:
        if self._on:
            from rich.console import Console
            from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

            console = Console(stderr=True)
            columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn())
            self._progress = Progress(
                *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
            )
            self._progress.start()
            self._task = self._progress.add_task(self._title, total=self._total)
        return self

    def advance(self, count: int) -> None:
        """So many requests have ended."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, count)

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
