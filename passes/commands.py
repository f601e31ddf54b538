"""What the command line shows of passes, and what it runs on a program's text."""

from __future__ import annotations

import inspect
from typing import Any

from ..ir.text import parse_program, print_program
from ..ir.verify import verify
from .base import Pass, PassContext
from .pass_manager import known_facts
from .pipeline import default_pipeline, parse_pipeline
from .registry import all_passes, get_pass


def list_passes() -> list[dict[str, Any]]:
    """Every known pass as data: name, phase, contract, options with defaults, documentation."""
    return [describe_pass(name) for name in all_passes()]


def describe_pass(name: str) -> dict[str, Any]:
    """One pass as data; UsageError with the nearest name where there is none."""
    kind = get_pass(name)
    return {
        "name": kind.name,
        "phase": kind.phase,
        "contract": kind.contract,
        "requires": sorted(kind.requires),
        "ensures": sorted(kind.ensures),
        "options": _options(kind),
        "runs": default_pipeline().names().count(kind.name),
        "doc": inspect.getdoc(kind) or "",
    }


def _options(kind: type[Pass]) -> dict[str, Any]:
    return {
        option.name: {"type": str(option.type), "default": option.default}
        for option in kind.__dataclass_fields__.values()
        if option.name not in {"name", "phase", "contract", "requires", "ensures", "tolerance"}
        and "ClassVar" not in str(option.type)
    }


def opt(text: str, pipeline_text: str, *, source: str = "<text>", check_order: bool = False) -> str:
    """The text of a program after the passes that `pipeline_text` names.

    The program is verified before the first and after each. Required facts are taken for granted,
    unless `check_order`: a single pass can then be run on a program that is ready for it. Raises
    ParseError, UsageError, or ProgramError for a program that is malformed before or after.
    """
    program = parse_program(text, source=source)
    verify(program)
    pipeline = parse_pipeline(pipeline_text)
    if check_order:
        pipeline.check(known_facts(program))
    for one in pipeline:
        result = one.run(program, PassContext())
        if result.matches:
            verify(result.program)
        program = result.program
    return print_program(program)
