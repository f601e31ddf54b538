"""Passes run on a program's text: what `infc opt` does."""

from __future__ import annotations

from ..ir.program import Program
from ..ir.text import parse_program, print_program
from ..ir.verify import verify
from .pass_manager import known_facts, run_passes
from .pass_report import PipelineReport
from .pipeline import parse_pipeline
from .samples import with_random_weights


def opt(text: str, pipeline_text: str, *, source: str = "<text>", check_order: bool = False) -> str:
    """The text of a program after the passes that `pipeline_text` names; see `opt_report`."""
    program, _, _ = opt_report(text, pipeline_text, source=source, check_order=check_order)
    return print_program(program)


def opt_report(
    text: str,
    pipeline_text: str,
    *,
    source: str = "<text>",
    check_order: bool = False,
    verify_numbers: bool = False,
) -> tuple[Program, Program, PipelineReport]:
    """A program after the passes that `pipeline_text` names and before them, and what they did.

    The program is verified before the first and after each. Required facts are taken for granted,
    unless `check_order`: a single pass can then be run on a program that is ready for it. With
    `verify_numbers` each pass is held to its contract, on random weights. Raises ParseError,
    UsageError, PassError, or ProgramError for a program that is malformed before or after.
    """
    program = parse_program(text, source=source)
    verify(program)
    pipeline = parse_pipeline(pipeline_text)
    if check_order:
        pipeline.check(known_facts(program))
    if verify_numbers:
        program = with_random_weights(program)
    result, report = run_passes(program, pipeline, verify=verify_numbers)
    return result, program, report
