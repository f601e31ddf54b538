"""What was freed goes back to the system, once the bodies that it held are gone."""

from __future__ import annotations

import contextlib
import ctypes


def release_memory() -> None:
    """Give back what the C library keeps for later, where it can; other threads run meanwhile."""
    with contextlib.suppress(OSError, AttributeError):  # not this C library
        ctypes.CDLL(None).malloc_trim(0)
