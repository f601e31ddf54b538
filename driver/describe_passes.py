"""What `infc passes` prints: the pipeline, and all about one pass."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path

from ..ir.backends import DEFAULT
from ..ir.targets import resolve_target
from .optimize import importable


def list_pipeline() -> str:
    """The passes in order, phase by phase, with what each does to numbers and why it is there.

    The last phase is that of the default backend.
    """
    from ..codegen.registry import get_backend
    from ..passes.pipeline import STAGES, parse_pipeline

    target = resolve_target("x86-64-v2")  # not that of this machine, which may be of none
    plan = parse_pipeline(get_backend(DEFAULT).plan_passes(target)).passes
    lines = []
    for phase, passes in {**STAGES, "plan": plan}.items():
        of = f" (of the backend {DEFAULT})" if phase == "plan" else ""
        lines.append(f"{phase}{of}" if passes else f"{phase} (no pass yet)")
        for one in passes:
            lines.append(f"  {one.name:<22} {one.contract:<13} {_purpose(type(one))}")
    return "\n".join(lines)


def describe_pass(name: str) -> str:
    """Documentation, options and place of a pass; UsageError with the nearest name.

    The module of a `my_module:MyPass` is looked for in the working directory too.
    """
    from ..passes.registry import get_pass

    with importable(Path.cwd()):
        kind = get_pass(name)
    lines = [kind.name, "", inspect.getdoc(kind) or "", ""]
    lines += [f"phase     {kind.phase}", f"numbers   {kind.contract}"]
    for label, facts in (("requires", kind.requires), ("ensures", kind.ensures)):
        if facts:
            lines.append(f"{label:<9} {', '.join(sorted(facts))}")
    options = [f"{option.name} = {option.default!r} ({option.type})" for option in fields(kind)]
    lines += [f"option    {option}" for option in options]
    return "\n".join(lines)


def _purpose(kind: type) -> str:
    """What its documentation says after `Why:`, else its first line."""
    text = inspect.getdoc(kind) or ""
    _, marked, reason = text.partition("Why: ")
    return " ".join((reason if marked else text.partition("\n")[0]).split()).rstrip(".")
