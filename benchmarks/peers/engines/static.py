"""Static batches, for peers that have no continuous ones."""

from __future__ import annotations

from collections.abc import Iterator

from ..workloads import Request

Prompts = tuple[tuple[int, ...], ...]


def batches(request: Request) -> Iterator[Prompts]:
    """The prompts, `concurrency` at a time; all of one batch are of one length."""
    for start in range(0, len(request.prompts), request.concurrency):
        yield request.prompts[start : start + request.concurrency]
