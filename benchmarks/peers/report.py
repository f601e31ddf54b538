"""The tables of a run.

python -m benchmarks.peers.report RESULTS.json
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from .goals import GOALS, Goal, Verdict, judge
from .results import Results, ShapeRun
from .summary import (
    METRICS,
    Metric,
    Spread,
    bits_per_weight,
    by_round,
    ceiling_spread,
    peak_rss_bytes,
    ratio,
    share,
    spread,
)

_NONE = "–"


def render(results: Results) -> str:
    """All of it, as Markdown."""
    parts = [" · ".join(f"{key} {value}" for key, value in results.machine.items())]
    for run in results.shapes:
        parts += _shape(run)
    parts += ["## Goals", *_goals(results)]
    return "\n\n".join(parts) + "\n"


def _shape(run: ShapeRun) -> Iterator[str]:
    yield f"## The {run.shape} shape"
    yield "Median (least–greatest) of the rounds. " + _ceilings(run)
    yield table(_main_rows(run))
    if rows := _ratio_rows(run):
        yield "infc over each peer of the same bits, round by round (of rates and of seconds):"
        yield table(rows)
    absent = [f"* not measured: {name}: {reason}" for name, reason in run.absent.items()]
    if notes := absent + [f"* failed: {line}" for line in run.failed]:
        yield "\n".join(notes)
    yield "\n".join(f"* {name}: {one.version}" for name, one in run.entrants.items())


def _ceilings(run: ShapeRun) -> str:
    read = ceiling_spread(run, "a", lambda c: c.read_bytes_per_s / 1e9)
    peaks = [ceiling_spread(run, "b", lambda c: c.bf16_per_s / 1e9)]
    peaks.append(ceiling_spread(run, "b", lambda c: c.int8_per_s / 1e9))
    return (
        f"Ceilings in the same rounds: read {_figure(read, 1)} GB/s,"
        f" bf16 {_figure(peaks[0], 0)} GFLOP/s, int8 {_figure(peaks[1], 0)} GOP/s."
    )


def _main_rows(run: ShapeRun) -> list[list[str]]:
    titles = [metric.title for metric in METRICS.values()]
    memory = ["peak RSS, MB: one request", "all"]
    rows = [["", "bits a weight", *titles, *memory, "CPU of others"]]
    for name in run.entrants:
        cells = [_cell(run, name, metric) for metric in METRICS.values()]
        peaks = [peak_rss_bytes(run, name, alone=alone) for alone in (True, False)]
        megabytes = [_NONE if peak is None else f"{peak / 1e6:.0f}" for peak in peaks]
        others = spread(s.others for s in run.samples if s.contestant == name)
        busy = f"{others.median:.0%}, at most {others.high:.0%}" if others else _NONE
        rows.append([name, f"{bits_per_weight(run, name):.2f}", *cells, *megabytes, busy])
    return rows


def _cell(run: ShapeRun, name: str, metric: Metric) -> str:
    text = _figure(spread(by_round(run, name, metric).values()), metric.digits)
    part = share(run, name, metric)
    return text if part is None else f"{text}, {part.median:.0%}"


def _ratio_rows(run: ShapeRun) -> list[list[str]]:
    rows = []
    for ours, entrant in run.entrants.items():
        for theirs, other in run.entrants.items():
            if not entrant.is_infc or other.is_infc or entrant.bits != other.bits:
                continue
            cells = [_figure(ratio(run, ours, theirs, m), 2) for m in METRICS.values()]
            rows.append([f"{ours} / {theirs}", *cells])
    return [["", *(m.title.split(", ")[0] for m in METRICS.values())], *rows] if rows else []


def _figure(found: Spread | None, digits: int) -> str:
    if found is None:
        return _NONE
    if found.count == 1:
        return f"{found.median:.{digits}f}"
    return f"{found.median:.{digits}f} ({found.low:.{digits}f}–{found.high:.{digits}f})"


def _goals(results: Results) -> Iterator[str]:
    runs = {run.shape: run for run in results.shapes}
    verdicts = [judge(goal, runs[goal.shape]) for goal in GOALS if goal.shape in runs]
    rows = [["goal", "wanted", "measured", ""]]
    rows += [_goal_row(verdict) for verdict in verdicts]
    yield table(rows)
    counts = [sum(v.met is state for v in verdicts) for state in (True, False, None)]
    yield "{} met, {} not met, {} not measured.".format(*counts)


def _goal_row(verdict: Verdict) -> list[str]:
    goal = verdict.goal
    words = {True: "met", False: "not met", None: "not measured"}
    what = f"{goal.shape} {goal.contestant} {goal.metric}"
    if goal.kind == "share":
        what += ", share of the ceiling"
    elif goal.against:
        what += f" / {verdict.against}"
    measured = _NONE if verdict.measured is None else _amount(goal, verdict.measured)
    return [what, f"{_sign(goal)} {_amount(goal, goal.bound)}", measured, words[verdict.met]]


def _sign(goal: Goal) -> str:
    if goal.kind == "memory":
        return "<"
    return "≥" if METRICS[goal.metric].more_is_better else "≤"


def _amount(goal: Goal, value: float) -> str:
    if goal.kind == "share":
        return f"{value:.0%}"
    return f"{value:.2f} ×" if goal.kind in ("ratio", "memory") else f"{value:.3g}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown, its columns aligned for those who read it as text. The first row is the head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


if __name__ == "__main__":
    print(render(Results.read(Path(sys.argv[1]))))
