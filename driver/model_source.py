"""Where a recipe's model lies: a directory beside the recipe, or a snapshot from the hub."""

from __future__ import annotations

from pathlib import Path

from ..ir.errors import CheckpointError, RecipeError
from .recipe import HUB_ID, Recipe

_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "*.txt"]


def find_model(recipe: Recipe, directory: Path) -> Path:
    """The checkpoint's directory; a hub id that is no such path is downloaded (or found cached).

    Raises CheckpointError where it is neither, RecipeError for a revision of a directory.
    """
    path = directory / Path(recipe.model).expanduser()
    if path.exists():
        if not path.is_dir():
            raise CheckpointError("the model is a file", where=str(path), hint="name its directory")
        if recipe.revision is not None:
            raise RecipeError(
                f"revision is {recipe.revision!r}, and the model is a directory, which has none",
                where=str(path),
                hint="leave revision out, or name a hub id",
            )
        return path.resolve()
    if not HUB_ID.fullmatch(recipe.model):
        raise CheckpointError(
            "no such model directory",
            where=str(path),
            hint="`model` is a path relative to the recipe, or a hub id such as org/name",
        )
    return _download(recipe, path)


def _download(recipe: Recipe, path: Path) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"no such model directory, and nothing here can download {recipe.model!r}",
            where=str(path),
            hint="pip install huggingface_hub",
        ) from None
    patterns = [*_PATTERNS, *(["*.py"] if recipe.trust_remote_code else [])]
    try:
        found = snapshot_download(recipe.model, revision=recipe.revision, allow_patterns=patterns)
    except Exception as error:  # a dozen kinds, from many layers, all of them final here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"no such directory, and the hub does not give {recipe.model!r}: {reason}",
            where=str(path),
            hint="check the name, the revision, the network, or HF_TOKEN",
        ) from error
    return Path(found)
