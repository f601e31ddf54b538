"""The standard streams of a process: there, and able to take any character."""

from __future__ import annotations

import io
import os
import sys

_STREAMS = (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_WRONLY, "w"), ("stderr", os.O_WRONLY, "w"))


def settle_streams() -> None:
    """Opens those that were closed, on nothing; writes what an encoding has not as escapes.

    A file that is opened later would otherwise get the number of a stream, and whatever a
    library writes there.
    """
    for descriptor, (name, flags, mode) in enumerate(_STREAMS):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, flags)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
