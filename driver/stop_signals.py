"""SIGINT and SIGTERM as exceptions, and those that a library turned into an error of its own."""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn

from ..ir.errors import Terminated

_raised: int | None = None


def raise_stop_signals() -> None:
    """Let SIGINT raise KeyboardInterrupt and SIGTERM Terminated, so that what is half written goes.

    Where SIGINT is ignored, as in a shell's background job, it stays so.
    """
    signal.signal(signal.SIGTERM, _terminate)
    if signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.default_int_handler):
        signal.signal(signal.SIGINT, _interrupt)


def stopped_by() -> int | None:
    """The signal that raised and was not handled since.

    Some libraries catch whatever comes and raise an error of their own: pydantic's SchemaError for
    what stopped the building of a schema is one. Only this tells such an error from a fault.
    """
    return _raised


def stop_was_handled() -> None:
    """Forget the signal: it has ended what it should, and the command goes on."""
    global _raised
    _raised = None


def _interrupt(number: int, _: FrameType | None) -> NoReturn:
    global _raised
    _raised = number
    raise KeyboardInterrupt


def _terminate(number: int, _: FrameType | None) -> NoReturn:
    global _raised
    _raised = number
    raise Terminated(128 + number)
