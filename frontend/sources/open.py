"""Opens a model by its path."""

from __future__ import annotations

from pathlib import Path

from .base import ModelSource


def open_source(path: Path) -> ModelSource:
    """The source that a path is: a GGUF file by its name, else a checkpoint directory."""
    if is_gguf(path):
        from .gguf.source import GgufSource

        return GgufSource(path)
    from .directory import DirectorySource

    return DirectorySource(path)


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file, by its name alone."""
    return path.suffix.lower() == ".gguf" and not path.is_dir()
