"""The sanitizers of addresses and undefined behaviour in what tests compile: `make sanitize`."""

from __future__ import annotations

import os

ACTIVE = "INFC_SANITIZE" in os.environ

# No check is optimised away at -O0, and the compiler takes two fifths of the time that it takes at
# -O1. Checks of addresses are calls: fewer instructions than those that stand in line.
_FLAGS = (
    "-O0",
    "--param=asan-instrumentation-with-call-threshold=0",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
)


def sanitized(flags: tuple[str, ...]) -> tuple[str, ...]:
    """The compiler's flags with the sanitizers added, and with names for their reports."""
    return (*(flag for flag in flags if flag != "-Wl,-s"), *_FLAGS)


def release_children() -> None:
    """What this process starts needs no sanitizer's library before all others, and is slower so."""
    os.environ.pop("LD_PRELOAD", None)
