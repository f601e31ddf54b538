"""Builds the pipeline of a recipe, before anything slow is imported, and runs it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..ir.errors import UsageError
from ..ir.nearest import did_you_mean
from ..ir.row_codes import E4M3_ROWS, I8_ROWS
from ..ir.schemes import AUTO, SCHEMES, six_bits
from ..ir.targets import Target
from ..ir.types import DType
from .progress import Reporter
from .recipe import LoadedRecipe

if TYPE_CHECKING:
    from ..ir.formats import Format
    from ..ir.program import Program
    from ..ir.quantized_pairs import QuantizedPairs
    from ..passes.base import PassContext
    from ..passes.lossy_stages import LossyStage
    from ..passes.methods.calibration import Calibration
    from ..passes.pass_report import PassReport
    from ..passes.pattern_uses import PatternUses
    from ..passes.pipeline import Pipeline

_SHOWN_NEAR_MISSES = 3
_CALIBRATION_SHARE = 9
"""Calibration takes so many times as long as all the passes, seen for the bar's sake."""
DTYPES: Final = {
    "float32": DType.F32.value,
    "bfloat16": DType.BF16.value,
    "float16": DType.F16.value,
}
"""What a recipe calls the type of matrices, and a program."""
CACHE_DTYPES: Final = {
    "auto": "auto",
    **DTYPES,
    "int8": I8_ROWS.name,
    "fp8": E4M3_ROWS.name,
}
"""What a recipe calls what a KV cache consists of, and a program (`ir/resources.py`)."""


@dataclass(frozen=True, slots=True)
class Optimized:
    """The program after all passes, a report about each without times, and what lossy ones left."""

    program: Program
    report: dict[str, Any]
    context: PassContext
    lossy: tuple[LossyStage, ...]


def build_recipe_pipeline(
    loaded: LoadedRecipe, plan: str = "", can_hold: Callable[[Format], bool] | None = None
) -> Pipeline:
    """The default pipeline with the changes of the recipe.

    `plan` is the text of the passes that the backend wants at its end (`Backend.plan_passes`).
    `can_hold` says for which formats it has kernels (`Backend.can_hold`): with those for 6 bits,
    the head has them beside 4 bits unless the recipe chooses.

    Modules named in the recipe are imported from its directory or from the working directory.
    Raises UsageError with the line of the recipe.
    """
    from ..passes.pipeline import (
        build_pipeline,
        parse_pipeline,
        with_kv_options,
        with_quantization,
    )

    recipe = loaded.recipe
    with importable(loaded.directory, Path.cwd()):
        pipeline = build_pipeline(
            recipe.passes or None,
            lambda path: loaded.tree.place(("passes", *path)),
            parse_pipeline(plan),
            recipe.backend,
        )
    how = recipe.quantization
    pipeline = with_quantization(
        pipeline,
        scheme=how.scheme,
        rules=[(rule.match, rule.scheme) for rule in how.rules],
        skip=how.skip,
        head=how.head_scheme,
        auto_head=_auto_head(how.head_scheme, how.scheme, can_hold),
        attention=how.attention_scheme,
        embedding=how.embedding,
        method=how.rounding_method,
        channel_scaling=how.scaling_method,
    )
    dtype = CACHE_DTYPES[recipe.kv_cache.dtype]
    return with_kv_options(pipeline, dtype=dtype, block_size=recipe.kv_cache.block_size)


def _auto_head(head: str, scheme: str, can_hold: Callable[[Format], bool] | None) -> str:
    """The scheme of an open head beside 4 bits; empty: the pass decides, for 8."""
    name = six_bits(scheme) if head == AUTO else ""
    return name if name and can_hold is not None and can_hold(SCHEMES[name].weight) else ""


def check_dump_name(name: str | None, pipeline: Pipeline) -> None:
    """Raises UsageError unless `name` is None, `all` or a pass of the pipeline."""
    names = [*pipeline.names(), "all"]
    if name is not None and name not in names:
        hint = did_you_mean(name, names, "`infc passes` lists them")
        raise UsageError(f"no pass {name!r} to dump the program after", hint=hint)


def optimize(
    program: Program,
    pipeline: Pipeline,
    target: Target,
    *,
    verify: bool,
    dump_ir_after: str | None,
    dump_dir: Path,
    progress: Reporter,
    pairs: QuantizedPairs | None = None,
    on_result: Callable[[Program], None] | None = None,
    calibration: Calibration | None = None,
    patterns: PatternUses | None = None,
    say_distances: bool = True,
) -> Optimized:
    """Runs the pipeline.

    `on_result` is told the program before the last comparison with the one that was captured.
    `patterns` is for programs that are compiled together (`PassContext`).
    `say_distances` is whether the distances of lossy passes on random tokens are printed.
    """
    from ..ir.quantized_pairs import QuantizedPairs
    from ..passes.base import PassContext
    from ..passes.pass_manager import run_pipeline

    count, done = len(pipeline), 0
    inner = count * _CALIBRATION_SHARE if calibration is not None else 0
    readers = max(1, sum(one.reads_text for one in pipeline))
    total, calibrated, before = count + inner, 0, 0

    def on_pass(name: str) -> None:
        nonlocal done, before
        before = calibrated
        detail = f"{name} ({done + 1} of {count} passes)"
        progress.advance(done + calibrated, total, detail)
        done += 1

    def on_calibration(part: int, of: int, detail: str) -> None:
        nonlocal calibrated
        calibrated = before + inner * part // (readers * max(1, of))
        progress.advance(done - 1 + calibrated, total, detail)

    def told(result: Program) -> None:
        progress.advance(total, total, "comparing runs before and after")
        if on_result is not None:
            on_result(result)

    if calibration is not None:
        calibration = replace(calibration, advance=on_calibration, pairs=pairs or QuantizedPairs())
    context = PassContext(
        target=target, log=progress.remark, calibration=calibration, patterns=patterns
    )
    result, report = run_pipeline(
        program,
        pipeline,
        context,
        verify=verify,
        dump_ir_after=dump_ir_after,
        dump_directory=dump_dir,
        failure_directory=dump_dir,
        on_pass=on_pass,
        on_result=told,
        pairs=pairs,
        say_distances=say_distances,
    )
    for line in _idle_passes(report.passes):
        progress.remark(line)
    for name, seconds in report.times:
        key = f"pass {name}"
        progress.seconds[key] = progress.seconds.get(key, 0.0) + seconds
    data = {**report.as_data(), "pipeline": pipeline.spell()}
    return Optimized(result, data, context, tuple(report.lossy))


def _idle_passes(reports: Iterable[PassReport]) -> Iterator[str]:
    """A line for each pass that is not our own and matched nothing: ours often have nothing to do.

    Of the near misses, the first few.
    """
    from ..passes.catalogue import OUR_PASSES

    ours = {kind.name for kind in OUR_PASSES}
    for one in reports:
        if one.name in ours or one.matches:
            continue
        near = "; ".join(map(str, one.near_misses[:_SHOWN_NEAR_MISSES])) or "none"
        more = len(one.near_misses) - _SHOWN_NEAR_MISSES
        more_text = f"; {more} more in report.json" if more > 0 else ""
        yield f"{one.name} matched nothing (near misses: {near}{more_text})"


def optimize_text(
    text: str, pipeline: str, *, source: str = "<text>", verify: bool = False
) -> tuple[str, str]:
    """IR text after the passes that `pipeline` spells, and a table of what each of them did.

    Each result is checked as a program, with `verify` in its numbers too. What a pass requires is
    taken for granted. Raises ParseError, UsageError, PassError, or ProgramError.
    """
    from ..ir.text import print_program
    from ..passes.commands import opt_report
    from .explain.collect import pass_facts
    from .explain.text import render_passes

    with importable(Path.cwd()):
        result, before, report = opt_report(text, pipeline, source=source, verify_numbers=verify)
    facts = tuple(pass_facts(report.as_data(), before))
    return print_program(result), render_passes(facts, report.phases)


@contextmanager
def importable(*directories: Path) -> Iterator[None]:
    """Lets modules in these directories be imported by name, as `python FILE` does for its own."""
    added = [str(directory) for directory in directories if str(directory) not in sys.path]
    sys.path[:0] = added
    try:
        yield
    finally:
        for name in added:
            sys.path.remove(name)
