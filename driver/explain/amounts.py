"""Amounts as people read them, and text that may go to a terminal."""

from __future__ import annotations

from ...ir.cost import Cost
from ...ir.sizes import format_size
from .facts import PassCost

_SCALES = ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k"))


def format_operations(count: int) -> str:
    """Operations in powers of a thousand: "5.2 G"."""
    for scale, letter in _SCALES:
        if count >= scale:
            return f"{count / scale:.1f} {letter}"
    return str(count)


def format_bytes(count: int) -> str:
    """Bytes: "1.5 GiB"; a dash for none."""
    return format_size(count) if count else "-"


def format_intensity(cost: Cost) -> str:
    """Operations a byte moved: below the machine's own ratio, memory is what a node waits for."""
    moved = moved_bytes(cost)
    return f"{cost.flops / moved:.1f}" if moved else "-"


def moved_bytes(cost: Cost | PassCost) -> int:
    """Bytes read and written."""
    return cost.bytes_read + cost.bytes_written


def format_share(part: float, whole: float) -> str:
    """A share in percent; a dash for nothing."""
    if not part or not whole:
        return "-"
    share = 100 * part / whole
    return "<0.1 %" if share < 0.05 else f"{share:.1f} %"


def format_seconds(seconds: float) -> str:
    """Seconds for people: "1.20 s", "35.1 ms", "7.3 µs"."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


def format_change(before: int, after: int) -> str:
    """A change in percent, with its sign; nothing where there is none."""
    if before == after:
        return ""
    if not before:
        return "new"
    change = 100 * (after - before) / before
    return f"{change:+.1f} %" if abs(change) >= 0.05 else "<0.1 %"


def printable(text: str) -> str:
    """The text with every control character written out, so that a name cannot move a cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
