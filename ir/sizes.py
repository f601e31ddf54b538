"""Amounts of memory, and counts of things, as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes of "512MiB", "1.5 GiB" or "2GB" (a power of 1000); ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"not a size such as 1GiB or 500MB: {text!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def format_size(count: int) -> str:
    """Bytes for people: "1.5 GiB"."""
    for unit, size in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def format_count(count: int, noun: str, plural: str | None = None) -> str:
    """So many of something: "1 thread", "2 threads", "2 near misses"."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"
