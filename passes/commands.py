"""Passes run on a program's text: what `infc opt` does."""

from __future__ import annotations

from ..ir.text import parse_program, print_program
from ..ir.verify import verify
from .base import PassContext
from .pass_manager import known_facts
from .pipeline import parse_pipeline


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
