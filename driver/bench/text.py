"""What was measured as tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ...ir.sizes import format_count, format_size
from ..explain.amounts import format_seconds
from ..explain.text import Page
from .ops import LineTime, StepTime
from .results import BenchResult, Percentiles, Phase, Spread, WorkloadResult

_WORKLOAD_HEAD = (
    "workload", ">output tok/s", ">prefill tok/s", ">decode tok/s",
    ">TTFT p50 / p99", ">ITL p50 / p99", ">host a step", ">of the roofline",
)  # fmt: skip
_STEP_HEAD = (">time", ">share", ">roofline", ">reached")


def render_bench(result: BenchResult, *, width: int, color: bool) -> str:
    """The whole report."""
    page = Page(width, color)
    page.pairs("", _summary(result))
    measured = [one for one in result.workloads if not one.skipped]
    page.table("workloads", _WORKLOAD_HEAD, [_workload_row(one) for one in measured])
    page.lines("skipped", _skipped(result.workloads))
    if result.steps:
        page.say(_steps_note(result.steps))
        page.table("steps by op", _steps_head(result.steps), _op_rows(result.steps))
        page.table("steps line by line", _steps_head(result.steps), _line_rows(result.steps))
    return page.text()


def _summary(result: BenchResult) -> Iterator[tuple[str, str]]:
    yield "artifact", f"{result.artifact} ({result.identity[:12]})"
    yield "model", f"{result.model}, backend {result.backend} for {result.target}"
    yield "machine", f"{result.cpu}, {format_count(result.threads, 'thread')}"
    if result.ceilings is not None:
        yield "ceilings", result.ceilings.describe()
    for one in result.workloads:
        yield one.workload.name, one.workload.describe()
    if result.start is not None:
        prompt = format_count(result.start.prompt_tokens, "token")
        took = _spread(result.start.seconds, lambda s: f"{s:.2f}")
        held = format_size(result.start.peak_rss_bytes)
        yield (
            "start",
            f"{took} s from a new process to its first token (prompt of {prompt}), {held}",
        )
    if result.peak_rss_bytes is not None:
        yield (
            "peak memory",
            f"{format_size(result.peak_rss_bytes)} resident, mapped weights included",
        )


def _skipped(results: Sequence[WorkloadResult]) -> Iterator[str]:
    return (f"{one.workload.name}: {one.skipped}" for one in results if one.skipped)


def _workload_row(one: WorkloadResult) -> Sequence[str]:
    host = "-" if one.host_step_microseconds is None else f"{one.host_step_microseconds:.0f} µs"
    return (
        one.workload.name,
        _rate(one.output),
        _rate(one.prefill),
        _rate(one.decode),
        _pair(one.ttft),
        _pair(one.itl),
        host,
        _share(main_phase(one)),
    )


def main_phase(one: WorkloadResult) -> Phase | None:
    """What a workload is about: a single request decodes, or only prefills; many do both."""
    if one.workload.requests > 1:
        return one.output
    return one.decode or one.prefill


def _rate(phase: Phase | None) -> str:
    return "-" if phase is None else _spread(phase.tokens_per_second, lambda rate: f"{rate:.1f}")


def _share(phase: Phase | None) -> str:
    if phase is None or phase.roofline is None:
        return "-"
    return f"{_spread(phase.roofline, lambda share: f'{100 * share:.0f}')} %"


def _spread(spread: Spread, spell: Callable[[float], str]) -> str:
    """ "102.1 (99.0–104.2)": the median, the least and the greatest."""
    median, least, most = (spell(value) for value in (spread.median, spread.min, spread.max))
    return median if least == most else f"{median} ({least}–{most})"


def _pair(times: Percentiles | None) -> str:
    if times is None:
        return "-"
    return f"{format_seconds(times.p50)} / {format_seconds(times.p99)}"


def _steps_note(steps: Sequence[StepTime]) -> str:
    return "; ".join(
        f"{step.name}: {format_count(step.queries, 'token')} of"
        f" {format_count(step.batch, 'sequence')} with {step.context} stored after it"
        for step in steps
    )


def _steps_head(steps: Sequence[StepTime]) -> Sequence[str]:
    cells = [f"{_STEP_HEAD[0]}, {step.name}" if not at else _STEP_HEAD[at]
             for step in steps for at in range(len(_STEP_HEAD))]  # fmt: skip
    return ("op", ">runs", *cells)


def _op_rows(steps: Sequence[StepTime]) -> Iterator[Sequence[str]]:
    """A row an op, the one that takes most of the first step first, and the whole step."""
    tables = [{line.name: line for line in step.by_name()} for step in steps]
    for name, first in tables[0].items():
        yield (name, str(first.runs), *_cells([table[name] for table in tables], steps))
    yield ("=in all", "", *_cells([_whole(step) for step in steps], steps))


def _line_rows(steps: Sequence[StepTime]) -> Iterator[Sequence[str]]:
    for same in zip(*(step.lines for step in steps), strict=True):
        yield (same[0].name, str(same[0].runs), *_cells(same, steps))


def _whole(step: StepTime) -> LineTime:
    return LineTime(name="", runs=1, nodes=0, measured=step.measured, predicted=step.predicted)


def _cells(lines: Sequence[LineTime], steps: Sequence[StepTime]) -> Iterator[str]:
    for line, step in zip(lines, steps, strict=True):
        yield format_seconds(line.measured)
        yield f"{100 * line.measured / step.measured:.1f} %"
        if not line.predicted:
            yield from ("-", "-")
            continue
        yield format_seconds(line.predicted)
        yield f"{100 * line.predicted / line.measured:.0f} %" if line.measured else "-"
