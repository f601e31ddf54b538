"""Opens an engine for the Python face: limits by keyword, and notes that nobody can miss."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from ...ir.artifact import Artifact, Verification
from ...ir.errors import UsageError
from ...ir.nearest import did_you_mean
from ..engine import Engine
from ..options import RuntimeOptions


class Unpicklable:
    """What holds threads and memory of its own: no copy of it could work."""

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise UsageError(
            f"{type(self).__name__} cannot be pickled or copied: it has threads and memory of its"
            " own",
            hint="open the artifact again, in each process that needs it",
        )


def open_engine(
    artifact: Artifact | str | os.PathLike[str],
    verify: Verification,
    on_note: Callable[[str], None] | None,
    limits: Mapping[str, Any],
) -> Engine:
    """The engine of an artifact under `limits`, the fields of RuntimeOptions.

    What had to be decided otherwise is told to `on_note`, or is a warning at the caller's caller.
    """
    engine = Engine.open(artifact, as_options(limits), verify=verify)
    for note in engine.plan.notes:
        if on_note is None:
            warnings.warn(note, stacklevel=3)
        else:
            on_note(note)
    return engine


def as_options(limits: Mapping[str, Any]) -> RuntimeOptions:
    """The options of these names and values; UsageError for a name that is none."""
    known = [field.name for field in fields(RuntimeOptions)]
    if wrong := [name for name in limits if name not in known]:
        near = did_you_mean(wrong[0], known)
        names = f"options: verify, on_note, {', '.join(known)}"
        raise UsageError(
            f"infc.LLM has no option {wrong[0]!r}",
            hint=f"{near} {names}" if near else names,
        )
    return RuntimeOptions(**limits)
