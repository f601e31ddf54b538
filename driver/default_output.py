"""What an output that nobody named may replace."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..ir.artifact import open_artifact
from ..ir.errors import ArtifactError


def keep_another_checkpoint(output: Path, identity: Callable[[], str | None], hint: str) -> None:
    """ArtifactError where `output` was made from another checkpoint than that of `identity`.

    Two models may have one name, and who names no output means to replace neither. `identity`
    is asked only where there is something to lose; `hint` says what to do instead.
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
