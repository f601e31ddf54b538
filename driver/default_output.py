"""Protects existing artifacts when no output is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..ir.artifact import open_artifact
from ..ir.errors import ArtifactError


def keep_another_checkpoint(
    output: Path, identity: Callable[[], str | None], hint: str
) -> Mapping[str, Any] | None:
    """Raises ArtifactError if `output` was made from a checkpoint other than that of `identity`.

    Two models may have the same name, and a default output must not replace the other one.
    `identity` is called only if the output exists. `hint` is part of the error. Returns the recipe
    of the artifact that is there, None if there is none.
    """
    if not output.is_dir():
        return None
    try:
        old = open_artifact(output, "none").manifest
    except ArtifactError:
        return None  # damaged, or of another version: the writer knows what may be replaced
    if old.checkpoint != identity():
        size = f"{old.model.num_parameters / 1e6:,.1f} M parameters"
        raise ArtifactError(
            f"it was made from another checkpoint ({old.model.architecture}, {size})",
            where=str(output),
            hint=hint,
        )
    return old.recipe


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys whose values differ between two recipes, as `quantization.scheme: int4 -> none`."""
    found = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += changed_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before} -> {after}")
    return found
