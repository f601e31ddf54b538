"""The recipes that are part of infc, by name."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from ..ir.nearest import nearest

_DIRECTORY = Path(__file__).resolve().parents[1] / "recipes"


@dataclass(frozen=True, slots=True)
class BundledRecipe:
    """A recipe with its name and file."""

    name: str
    path: Path

    def summary(self) -> str:
        """A description of one line: the comment at the beginning of the file."""
        with self.path.open(encoding="utf-8") as file:
            return file.readline().lstrip("# ").rstrip(".\n")


@functools.cache
def bundled_recipes() -> dict[str, BundledRecipe]:
    """All bundled recipes by name: `NAME.yaml`, or `NAME/model.yaml` for those with more files."""
    paths = {path.stem: path for path in _DIRECTORY.glob("*.yaml")}
    paths.update((path.parent.name, path) for path in _DIRECTORY.glob("*/model.yaml"))
    return {name: BundledRecipe(name, paths[name]) for name in sorted(paths)}


def nearest_name(word: str) -> str | None:
    """The most similar name of a bundled recipe; None if there is none."""
    return nearest(word.lower(), bundled_recipes(), cutoff=0.7)
