"""Where the time of a step goes, line by line of the generated code, beside what it must take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...ir.backends import DEFAULT
from ...ir.errors import UsageError
from ...ir.roofline import Ceilings, Roofline
from ...runtime.executors.base import run_step
from ..bare_executor import open_bare
from ..explain.collect import read_program
from .trial_steps import TrialStep, fill_blocks

if TYPE_CHECKING:
    from ...ir.artifact import Artifact
    from ...runtime.executors.base import ProfiledExecutor, ProfileEntry

WARM_UP_STEPS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LineTime:
    """One line of the step: how often it ran, for how many nodes, and its seconds in one step.

    `predicted` is the roofline of its nodes; None where nobody measured the machine.
    """

    name: str
    runs: int
    nodes: int
    measured: float
    predicted: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """One kind of step: what it was, its lines in order, and its seconds.

    `measured` is of the whole call, the lines are what thread 0 was busy or waiting with; both are
    means over the fastest quarter of `steps`, as other work on the machine only ever adds.
    """

    name: str
    batch: int
    queries: int
    context: int
    steps: int
    lines: tuple[LineTime, ...]
    measured: float
    predicted: float | None

    def by_name(self) -> tuple[LineTime, ...]:
        """Lines of one name together, the longest first."""
        groups: dict[str, list[LineTime]] = {}
        for line in self.lines:
            groups.setdefault(line.name, []).append(line)
        sums = (_together(name, lines) for name, lines in groups.items())
        return tuple(sorted(sums, key=lambda line: -line.measured))


def measure_steps(
    artifact: Artifact,
    trials: Mapping[str, TrialStep],
    *,
    threads: int,
    ceilings: Ceilings | None,
    repeats: int = 20,
    on_step: Callable[[int, int], None] | None = None,
) -> list[StepTime]:
    """Runs each step `repeats` times on the executor alone; `on_step` hears of done and all.

    UsageError where the artifact's backend cannot tell where the time of a step goes.
    """
    roofline = None if ceilings is None else Roofline(read_program(artifact), ceilings)
    each = zip(*(trial.num_blocks(artifact.manifest) for trial in trials.values()), strict=True)
    num_blocks = tuple(max(counts) for counts in each)
    total, done, results = len(trials) * repeats, 0, []
    with _open(artifact, num_blocks, threads) as executor:
        fill_blocks(executor, artifact.manifest, num_blocks)
        for name, trial in trials.items():
            step = trial.build(artifact.manifest)
            for _ in range(WARM_UP_STEPS):
                run_step(executor, step)
            rounds = []
            for _ in range(repeats):
                before, begun = executor.profile(), time.perf_counter()
                run_step(executor, step)
                took = time.perf_counter() - begun
                rounds.append((took, before, executor.profile()))
                done += 1
                if on_step is not None:
                    on_step(done, total)
            results.append(_step_time(name, trial, rounds, roofline))
    return results


@contextmanager
def _open(
    artifact: Artifact, num_blocks: tuple[int, ...], threads: int
) -> Iterator[ProfiledExecutor]:
    from ...runtime.executors.base import ProfiledExecutor, work_ahead

    with open_bare(artifact, num_blocks, num_threads=threads, profile=True) as executor:
        if not isinstance(executor, ProfiledExecutor):
            raise UsageError(
                f"the backend {artifact.manifest.backend} cannot measure the time of each op",
                where=str(artifact.path),
                hint=f"leave out --ops, or compile for the backend {DEFAULT}",
            )
        work_ahead(executor)
        yield executor


Round = tuple[float, Sequence["ProfileEntry"], Sequence["ProfileEntry"]]
"""Seconds of a step, and the profile before and after it."""


def _step_time(
    name: str, trial: TrialStep, rounds: Sequence[Round], roofline: Roofline | None
) -> StepTime:
    fastest = sorted(rounds, key=lambda one: one[0])[: max(1, len(rounds) // 4)]
    entries = rounds[0][1]
    needed = roofline.node_seconds(trial.shape) if roofline is not None else None
    owners = _owners(entries)
    lines = []
    for index, entry in enumerate(entries):
        spent = (
            after[index].nanoseconds - before[index].nanoseconds for _, before, after in fastest
        )
        _, before, after = rounds[0]
        own = [label for label in entry.nodes if owners[label] == index]
        lines.append(
            LineTime(
                name=entry.name,
                runs=after[index].count - before[index].count,
                nodes=len(entry.nodes),
                measured=statistics.fmean(spent) / 1e9,
                predicted=None if needed is None else sum(needed[label] for label in own),
            )
        )
    return StepTime(
        name=name,
        batch=trial.batch,
        queries=trial.queries,
        context=trial.context,
        steps=len(rounds),
        lines=tuple(lines),
        measured=statistics.fmean(took for took, _, _ in fastest),
        predicted=None if roofline is None else roofline.step_seconds(trial.shape),
    )


def _owners(entries: Sequence[ProfileEntry]) -> dict[str, int]:
    """For each node its last line: those before it only prepare operands."""
    return {label: index for index, entry in enumerate(entries) for label in entry.nodes}


def _together(name: str, lines: Sequence[LineTime]) -> LineTime:
    predicted = [line.predicted for line in lines if line.predicted is not None]
    return LineTime(
        name=name,
        runs=sum(line.runs for line in lines),
        nodes=sum(line.nodes for line in lines),
        measured=sum(line.measured for line in lines),
        predicted=sum(predicted) if predicted else None,
    )
