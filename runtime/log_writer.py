"""Lines to stderr, which may be full, closed, or a pipe that nobody reads: nobody waits for it."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
import time
from collections import deque

_MAX_LINES = 4096  # beyond them, lines are lost and counted
_MAX_LINE = 1 << 16  # characters
_TOGETHER = 64  # lines of one write


class LogWriter:
    """Writes lines from a thread of its own. `write` never blocks and never raises.

    Python's own stream is left alone: its lock would be held for as long as a write takes, and
    whoever writes an error, or ends the process, would wait for it.
    """

    def __init__(self) -> None:
        self._lines: deque[str] = deque()
        self._num_lost = 0
        self._changed = threading.Condition()
        self._busy = False
        self._thread: threading.Thread | None = None

    def write(self, text: str) -> None:
        """Queue lines, without the last line's end."""
        if _descriptor() is None:  # an object that somebody put in its place
            with contextlib.suppress(Exception):
                print(text, file=sys.stderr, flush=True)
            return
        with self._changed:
            if len(self._lines) >= _MAX_LINES:
                self._num_lost += 1
                return
            self._lines.append(text[:_MAX_LINE])
            self._changed.notify_all()
            if self._thread is None or not self._thread.is_alive():
                with contextlib.suppress(RuntimeError, MemoryError):  # the next line tries again
                    thread = threading.Thread(target=self._run, name="infc-log", daemon=True)
                    thread.start()
                    self._thread = thread

    def flush(self, seconds: float) -> bool:
        """Wait until everything is written, for so long at most; whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._lines and not self._busy, seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: bool(self._lines))
                lines = [self._lines.popleft() for _ in range(min(_TOGETHER, len(self._lines)))]
                if self._num_lost:
                    lines.append(f"warning: {self._num_lost} lines of this log were lost")
                    self._num_lost = 0
                self._busy = True
            # There is nobody left who could be told.
            with contextlib.suppress(OSError, MemoryError):
                _write_all("".join(f"{line}\n" for line in lines).encode("utf-8", "replace"))


def _descriptor() -> int | None:
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        return None


def _write_all(data: bytes) -> None:
    """Raises OSError; waits where nothing can be written."""
    while data:
        descriptor = _descriptor()
        if descriptor is None:
            return
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            with contextlib.suppress(ValueError):  # a number that select cannot hold
                select.select([], [descriptor], [], 1.0)
            time.sleep(0.01)


LOG_WRITER = LogWriter()
"""What every log of this process goes through."""
