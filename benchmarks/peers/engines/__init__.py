"""One module a peer: `load(model, threads)` gives its engine, `weigh(model)` its weights' bytes.

Each imports its library when loaded, in the peer's own environment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..workloads import Request

OnTokens = Callable[[int], None]
"""Hears of tokens as they arrive: how many came now, of all requests together."""


class Engine(Protocol):
    """A loaded model."""

    version: str

    def generate(self, request: Request, on_tokens: OnTokens) -> None:
        """Answer greedily, end-of-sequence ignored, as many tokens as asked for."""
