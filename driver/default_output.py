"""Protects existing artifacts when no output is given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..ir.artifact import open_artifact
from ..ir.errors import ArtifactError


def keep_another_checkpoint(output: Path, identity: Callable[[], str | None], hint: str) -> None:
    """Raises ArtifactError if `output` was made from a checkpoint other than that of `identity`.

    Two models may have the same name, and a default output must not replace the other one.
    `identity` is called only if the output exists. `hint` is part of the error.
    """
    if not output.is_dir():
        return
    try:
        old = open_artifact(output, "none").manifest
    except ArtifactError:
        return  # damaged, or of another version: the writer knows what may be replaced
    if old.checkpoint != identity():
        size = f"{old.model.num_parameters / 1e6:,.1f} M parameters"
        raise ArtifactError(
            f"it was made from another checkpoint ({old.model.architecture}, {size})",
            where=str(output),
            hint=hint,
        )
