"""SIGHUP: somebody asks for another artifact, or has closed the terminal."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_TERMINAL = "/dev/tty"


class Hangups:
    """Tells both apart, and remembers that it was asked until the server looks for it."""

    def __init__(self) -> None:
        self._had_terminal = _has_terminal()
        self._is_asked = False

    def ask(self) -> bool:
        """For a signal: whether it asks; False if the terminal is gone."""
        if self._had_terminal and not _has_terminal():
            return False
        self._is_asked = True
        return True

    def take(self) -> bool:
        """Whether it was asked since the last time."""
        asked, self._is_asked = self._is_asked, False
        return asked

    @contextlib.contextmanager
    def remembered(self) -> Iterator[None]:
        """Within, no signal that asks ends this process: it may still open its first artifact.

        One that tells of a closed terminal does, as before.
        """
        if not is_heard():
            yield
            return

        def hear(number: int, _: FrameType | None) -> None:
            if not self.ask():
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)

        before = signal.signal(signal.SIGHUP, hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGHUP, before)


def is_heard() -> bool:
    """Whether this thread may handle SIGHUP: not where nohup or a service manager ignores it."""
    heard = threading.current_thread() is threading.main_thread()
    return heard and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN


def _has_terminal() -> bool:
    """Whether this process has a terminal that is still there."""
    try:
        os.close(os.open(_TERMINAL, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK))
    except OSError:
        return False
    return True
