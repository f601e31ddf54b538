"""Keeps what large tensors leave behind for the next ones, instead of giving it back each time."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

# https://man7.org/linux/man-pages/man3/mallopt.3.html
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_KEPT_BYTES = 1 << 30
_USUAL_BYTES = 1 << 25
"""What glibc itself arrives at in a process that frees large blocks."""


@contextlib.contextmanager
def kept_for_reuse() -> Iterator[None]:
    """Freed blocks of up to 1 GiB stay with this process within; afterwards they are given back.

    By default glibc maps each large block anew, and the kernel clears every page of it again: a
    third of the time that verification takes. A C library without these settings is left alone.
    """
    library = ctypes.CDLL(None)
    if not (hasattr(library, "mallopt") and hasattr(library, "malloc_trim")):
        yield
        return
    # Older versions take no more than 32 MiB.
    if not library.mallopt(_MMAP_THRESHOLD, _KEPT_BYTES):
        library.mallopt(_MMAP_THRESHOLD, _USUAL_BYTES)
    library.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
    try:
        yield
    finally:
        library.mallopt(_MMAP_THRESHOLD, _USUAL_BYTES)
        library.mallopt(_TRIM_THRESHOLD, 2 * _USUAL_BYTES)
        library.malloc_trim(0)


def release_memory() -> None:
    """Give back what the C library keeps for later, where it can; other threads run meanwhile."""
    with contextlib.suppress(OSError, AttributeError):  # not this C library
        ctypes.CDLL(None).malloc_trim(0)
