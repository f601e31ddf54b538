"""Finds the checkpoint of a recipe: a directory, a GGUF file, or a snapshot from the hub."""

from __future__ import annotations

from pathlib import Path

from ..ir.errors import CheckpointError, RecipeError
from .recipe import GGUF, HUB_ID, Recipe

_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "*.txt"]
# Other copies of the same weights that some repositories contain.
_DUPLICATES = ["original/*", "consolidated*", "metal/*", "onnx/*"]


def find_model(recipe: Recipe, directory: Path) -> Path:
    """The checkpoint directory or GGUF file; a hub id is downloaded, unless it is in the cache.

    A directory or file of that name takes precedence. Raises CheckpointError if there is no such
    model, and RecipeError if a revision is given for a directory or file.
    """
    path = directory / Path(recipe.model).expanduser()
    if path.exists():
        if not path.is_dir() and path.suffix.lower() != GGUF:
            raise CheckpointError(
                "the model is a file", where=str(path), hint=f"name its directory, or a {GGUF} file"
            )
        if recipe.revision is not None:
            kind = "directory" if path.is_dir() else "file"
            raise RecipeError(
                f"the model is a {kind}, which has no revision {recipe.revision!r}",
                where=str(path),
                hint="remove revision, or use a hub id",
            )
        return path.resolve()
    if not HUB_ID.fullmatch(recipe.model) or path.suffix.lower() == GGUF:
        what = "GGUF file" if path.suffix.lower() == GGUF else "model directory"
        raise CheckpointError(
            f"no such {what}",
            where=str(path),
            hint="`model` is a path relative to the recipe, or a hub id such as org/name",
        )
    return _download(recipe, path)


def _download(recipe: Recipe, path: Path) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            "no such model directory, and huggingface_hub, which is required to download"
            f" {recipe.model!r}, is not installed",
            where=str(path),
            hint="pip install huggingface_hub",
        ) from None
    patterns = [*_PATTERNS, *(["*.py"] if recipe.trust_remote_code else [])]
    try:
        found = snapshot_download(
            recipe.model,
            revision=recipe.revision,
            allow_patterns=patterns,
            ignore_patterns=_DUPLICATES,
        )
    except Exception as error:  # a dozen kinds, from many layers, all of them final here
        reason, hint = _reason(recipe, error)
        raise CheckpointError(
            f"no such directory, and the hub does not provide {recipe.model!r}: {reason}",
            where=str(path),
            hint=hint,
        ) from error
    return Path(found)


def _reason(recipe: Recipe, error: Exception) -> tuple[str, str]:
    """The reason why the download failed, and a hint."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"https://huggingface.co/{recipe.model}"
    if isinstance(error, GatedRepoError):
        return "access must be granted first", f"ask for it at {page}, and set HF_TOKEN"
    if isinstance(error, RevisionNotFoundError):
        return f"it has no revision {recipe.revision!r}", f"see {page}/tree/main"
    if isinstance(error, RepositoryNotFoundError):
        return "no such model, or a private one", "check the name, or set HF_TOKEN"
    if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return "it is not in the cache, and HF_HUB_OFFLINE is set", "unset it to download the model"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return reason, "check the network, the name and HF_TOKEN"
