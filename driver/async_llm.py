"""`infc.AsyncLLM`, which also accepts models that are not compiled yet."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from ..ir.artifact import Verification
from ..runtime.api import async_llm
from .llm import Model, Overrides, artifact_of


class AsyncLLM(async_llm.AsyncLLM):
    """Serves many asyncio tasks with one model; an async context manager, or await `close`.

    The arguments are the same as for `LLM`. The model is opened, and compiled if necessary, on the
    calling thread; the engine then runs on its own thread.
    """

    def __init__(
        self,
        model: Model,
        *,
        overrides: Overrides = (),
        verify: Verification = "stamp",
        on_note: Callable[[str], None] | None = None,
        **limits: Any,
    ) -> None:
        notes: list[str] = []
        artifact = artifact_of(model, overrides, verify, limits)
        super().__init__(artifact, verify=verify, on_note=on_note or notes.append, **limits)
        for note in notes:
            warnings.warn(note, stacklevel=2)
