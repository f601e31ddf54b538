"""The ceilings of a machine as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..explain.text import Page
from .ceilings import Machine

_HEAD = (">threads", ">read, GB/s", ">fp32, GFLOP/s", ">bf16, GFLOP/s", ">int8, GOP/s")


def render_machine(machine: Machine, *, width: int, color: bool) -> str:
    """The processor, and a row for each number of threads."""
    page = Page(width, color)
    page.pairs("", [("processor", machine.cpu), ("target", machine.target)])
    page.table("ceilings", _HEAD, _rows(machine))
    return page.text()


def _rows(machine: Machine) -> Iterator[Sequence[str]]:
    for one in machine.ceilings:
        products = (f"{rate / 1e9:.0f}" for rate in (one.fp32, one.bf16, one.int8))
        yield (str(one.threads), f"{one.read / 1e9:.1f}", *products)
