"""Faults that end one request, or one step, and nothing else."""

from __future__ import annotations

import contextlib
import logging

from ..ir.errors import InfcError
from .memory_reserve import RESERVE

_LOG = logging.getLogger("infc.runtime")


class GivenUpError(InfcError):
    """A request that is continued no more, as engine processes died of it."""


def is_fault(error: BaseException) -> bool:
    """Whether it says that something failed, and not that the process is to end.

    Not only an Exception does: the libraries written in Rust panic with a BaseException.
    """
    return not isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit))


def note_fault(what: str, error: BaseException) -> str:
    """Log that `what` failed; what whoever waits for it is told."""
    if isinstance(error, MemoryError):
        RESERVE.free()
    with contextlib.suppress(Exception):  # where memory is short, logging fails as well
        _LOG.error("%s failed", what, exc_info=error)
    return f"{what} failed: {type(error).__name__}"
