"""`infc.LLM`, which also accepts models that are not compiled yet."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..ir.artifact import Artifact, Verification, check_verification
from ..runtime.api import llm
from ..runtime.api.opening import as_options

Model = Artifact | str | os.PathLike[str]
Overrides = Iterable[str] | Mapping[str, Any]


class LLM(llm.LLM):
    """Generates text with a model. Not thread-safe; a context manager, or call `close`.

    `model` is an artifact, a recipe, the name of a bundled recipe, a checkpoint directory or a hub
    id `org/name`. A model that is not compiled yet is compiled first, with progress on stderr, and
    stored in the cache. `overrides` are keys of the recipe, such as `{"quantization": "int8"}`.

    Other keyword arguments are the fields of `RuntimeOptions`: `max_context`, `max_sequences`,
    `step_tokens`, `kv_memory`, `threads`, ... A setting that had to be changed, such as a shorter
    context because of little memory, is reported to `on_note`, or as a warning.

    Raises the errors of `infc.compile`, ArtifactError, TargetError, CapacityError, and UsageError
    for an unknown keyword or for overrides of an artifact.
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


def artifact_of(
    model: Model, overrides: Overrides, verify: Verification, limits: Mapping[str, Any]
) -> Artifact | Path:
    """The artifact to open; invalid arguments are rejected before anything is compiled."""
    from .open_model import artifact_path

    check_verification(verify)
    as_options(limits)
    if isinstance(model, Artifact):
        artifact_path(model.path, overrides)
        return model
    return artifact_path(model, overrides)
