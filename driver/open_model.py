"""Opens models given as artifacts, recipes, checkpoints or hub ids; compiles them if necessary."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir.artifact import Artifact, Verification, open_artifact
from ..ir.errors import UsageError

if TYPE_CHECKING:
    from .progress import Reporter


def is_artifact(model: str | os.PathLike[str]) -> bool:
    """Whether `model` is the path of an artifact, existing or not."""
    path = Path(model)
    if path.suffix == ".infc":
        return not path.is_file()
    return (path / "manifest.json").exists() and not (path / "config.json").exists()


def artifact_path(
    model: str | os.PathLike[str],
    overrides: Iterable[str] | Mapping[str, Any] = (),
    progress: Reporter | None = None,
) -> Path:
    """The path of the artifact of a model, which is compiled into the cache if necessary.

    `overrides` are keys of the recipe, as in `compile_model`. `progress` is told about the
    compilation; by default it is shown on stderr. Raises UsageError for overrides of an artifact,
    and the errors of `compile_model`.
    """
    if not is_artifact(model):
        from .compile import compile_cached
        from .progress import make_reporter

        progress = progress or make_reporter(quiet=False)
        return compile_cached(model, overrides=overrides, progress=progress).path
    for override in [overrides] if isinstance(overrides, str) else overrides:
        raise UsageError(
            f"--set {override} has no effect, because this is a compiled artifact",
            where=os.fspath(model),
            hint="compile the model again with it, or pass the model instead of the artifact",
        )
    return Path(model)


def open_model(
    model: str | os.PathLike[str],
    overrides: Iterable[str] | Mapping[str, Any] = (),
    verify: Verification = "stamp",
) -> Artifact:
    """Opens the artifact that `artifact_path` returns; its weights are verified later."""
    return open_artifact(artifact_path(model, overrides), verify, weights="later")


def artifact_and_names(model: str, overrides: tuple[str, ...]) -> tuple[Path, tuple[str, ...]]:
    """Where the artifact lies, compiled if need be; names of its model, none for an artifact's."""
    path = artifact_path(model, overrides)
    if is_artifact(model):
        return path, ()
    recorded = str(open_artifact(path, "none").manifest.recipe["model"])
    return path, (recorded,) if Path(model).exists() else tuple(dict.fromkeys((model, recorded)))
