"""The sanitizers of addresses and undefined behaviour in what tests compile: `make sanitize`."""

from __future__ import annotations

import os

ACTIVE = "INFC_SANITIZE" in os.environ

_FLAGS = (
    "-O1",
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
