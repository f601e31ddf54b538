"""Freed memory, given back to the system."""

from __future__ import annotations

import ctypes


def give_back_freed() -> None:
    """Give back what was freed and is still kept by the C library, where that can be asked for.

    Reading a tokenizer of 150 000 tokens leaves 25 MB of it in every process that does. Takes some
    milliseconds, in which other threads that allocate wait.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, and musl does not
    if trim is not None:
        trim(0)
