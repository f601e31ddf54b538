"""An event loop that a moment without memory does not end."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from ..memory_reserve import RESERVE


class SturdyEventLoop(asyncio.SelectorEventLoop):
    """Goes on where memory runs out: what was being done fails, and frees the memory kept back."""

    def __init__(self) -> None:
        super().__init__()
        self.set_exception_handler(_handle)

    def _run_once(self) -> None:
        # It has no public name. What it raises ends the loop, and the process with all answers;
        # what is ready and was not run is still there, and sockets say again that they are.
        try:
            super()._run_once()  # type: ignore[misc]
        except MemoryError:
            RESERVE.free()


def _handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What a callback raised."""
    if isinstance(context.get("exception"), MemoryError):
        RESERVE.free()
    with contextlib.suppress(MemoryError):  # of writing it down
        loop.default_exception_handler(context)
