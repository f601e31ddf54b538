"""The recipes that come with infc, each known by its name."""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass
from pathlib import Path

_DIRECTORY = Path(__file__).resolve().parents[1] / "recipes"


@dataclass(frozen=True, slots=True)
class BundledRecipe:
    """One recipe: its name, its file, and the comment that the file opens with."""

    name: str
    path: Path

    def summary(self) -> str:
        """What the recipe is for, in one line: the first line of the file, a comment."""
        with self.path.open(encoding="utf-8") as file:
            return file.readline().lstrip("# ").rstrip(".\n")


@functools.cache
def bundled_recipes() -> dict[str, BundledRecipe]:
    """Every bundled recipe by name: `NAME.yaml`, or `NAME/model.yaml` where files belong to it."""
    paths = {path.stem: path for path in _DIRECTORY.glob("*.yaml")}
    paths.update((path.parent.name, path) for path in _DIRECTORY.glob("*/model.yaml"))
    return {name: BundledRecipe(name, paths[name]) for name in sorted(paths)}


def nearest_name(word: str) -> str | None:
    """The name of a bundled recipe that is spelt most like `word`; None where none is close."""
    close = difflib.get_close_matches(word.lower(), bundled_recipes(), n=1, cutoff=0.7)
    return close[0] if close else None
