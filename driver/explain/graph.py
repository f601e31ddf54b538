"""Writes what `infc inspect --graph` asks for: a page, or a drawing alone."""

from __future__ import annotations

import os
from pathlib import Path

from ...ir.errors import UsageError
from .facts import ArtifactFacts
from .graph_page import html_page
from .graph_svg import svg_page

_KINDS = {".html": html_page, ".svg": svg_page}


def write_graph(facts: ArtifactFacts, path: str | os.PathLike[str]) -> Path:
    """Writes `path`, which ends in `.html` or `.svg`, and returns it.

    UsageError for another ending, for an artifact without its program, or what can't be written.
    """
    target = Path(path)
    kind = _KINDS.get(target.suffix.lower())
    if kind is None:
        raise UsageError("the file name of a graph must end in .html or .svg", where=str(target))
    if facts.program is None:
        raise UsageError("the artifact contains no program.ir to draw", where=facts.path)
    try:
        target.write_text(kind(facts), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot be written: {error.strerror}", where=str(target)) from None
    return target
