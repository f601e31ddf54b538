"""`infc.LLM` and `infc.AsyncLLM`: those of the runtime, opened with whatever stands for a model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..ir.artifact import Artifact, Verification, check_verification
from ..runtime import async_llm, llm
from ..runtime.opening import as_options

Model = Artifact | str | os.PathLike[str]
Overrides = Iterable[str] | Mapping[str, Any]


class LLM(llm.LLM):
    """Generates text with a model. Not thread-safe; a context manager, or call `close`.

    `model` is an artifact, a recipe or the name of a bundled one, a checkpoint directory, or a hub
    id `org/name`. What is not compiled is compiled first, with progress on stderr, and kept in the
    cache; `overrides` are keys of its recipe, such as `{"quantization": "int8"}`.

    Other keyword arguments are the fields of `RuntimeOptions`: `max_context`, `max_sequences`,
    `step_tokens`, `kv_memory`, `threads`, ... A setting that had to be changed, such as a shorter
    context because of little memory, is reported to `on_note`, or as a warning.

    Raises whatever `infc.compile` raises, ArtifactError, TargetError, CapacityError, and UsageError
    for an unknown keyword, or overrides of what is compiled already.
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
        artifact = _artifact_of(model, overrides, verify, limits)
        super().__init__(artifact, verify=verify, on_note=on_note or notes.append, **limits)
        for note in notes:
            warnings.warn(note, stacklevel=2)


class AsyncLLM(async_llm.AsyncLLM):
    """Serves many asyncio tasks with one model; an async context manager, or await `close`.

    Arguments are those of `LLM`. Opening, and compiling where that is needed, takes place on the
    calling thread; the engine then runs on a thread of its own.
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
        artifact = _artifact_of(model, overrides, verify, limits)
        super().__init__(artifact, verify=verify, on_note=on_note or notes.append, **limits)
        for note in notes:
            warnings.warn(note, stacklevel=2)


def _artifact_of(
    model: Model, overrides: Overrides, verify: Verification, limits: Mapping[str, Any]
) -> Artifact | Path:
    """What the runtime opens; arguments that it would refuse are refused before compiling."""
    from .open_model import artifact_path

    check_verification(verify)
    as_options(limits)
    if isinstance(model, Artifact):
        artifact_path(model.path, overrides)
        return model
    return artifact_path(model, overrides)
