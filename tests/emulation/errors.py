"""What the emulation refuses."""

from __future__ import annotations


class EmulationError(Exception):
    """A kernel does what a device would not forgive, or what the emulation does not know.

    The message names the instruction and the line of the source that it was compiled from.
    """
