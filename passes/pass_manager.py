"""Runs a pipeline: times, reports, dumps and verifies what each pass did."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..ir.analyses import node_label
from ..ir.cost import Cost
from ..ir.errors import PassError, ProgramError, UsageError
from ..ir.nearest import did_you_mean
from ..ir.ops import PHASES
from ..ir.program import Program
from ..ir.quantized_pairs import QuantizedPairs
from ..ir.text import print_program
from ..ir.verify import verify as check_program
from .base import REACHES, Pass, PassContext, PassResult, phases_ending
from .compare import Distance
from .lossy_stages import LossyStage
from .near_miss import NearMiss
from .pass_report import PassReport, PipelineReport, step_cost
from .pipeline import Pipeline
from .user_code import pass_title, run_guarded
from .verification import Checked, Verifier


def run_pipeline(
    program: Program,
    pipeline: Pipeline,
    context: PassContext | None = None,
    *,
    verify: bool = True,
    dump_ir_after: str | Iterable[str] | None = None,
    dump_directory: str | Path = ".",
    failure_directory: str | Path = ".",
    on_pass: Callable[[str], None] | None = None,
    on_result: Callable[[Program], None] | None = None,
    pairs: QuantizedPairs | None = None,
    say_distances: bool = True,
) -> tuple[Program, PipelineReport]:
    """The program after every pass, and what they did.

    The program is checked after each pass that changed it; with `verify` its numbers too.
    `dump_ir_after` names passes ("all": every one) whose result is written to `dump_directory` as
    `03-fuse-rope.ir`. `on_pass` is told each pass before it runs, `on_result` the program that
    all of them gave, before whole runs of a heavy one are compared. Runs that compare programs
    take codes and scales of matrices from `pairs`. Without `say_distances` the distances of lossy
    passes are recorded, and not told to the log. PassError names a pass that failed; the program
    it received is then in `failure_directory`. UsageError for a wrong order.
    """
    manager = _Manager(
        context or PassContext(),
        verify=Verifier(pairs) if verify else None,
        dumps=_dump_names(dump_ir_after, pipeline),
        dump_directory=Path(dump_directory),
        failure_directory=Path(failure_directory),
        say_distances=say_distances,
    )
    pipeline.check(known_facts(program))
    passes = list(pipeline)
    if manager.verify is not None:
        manager.verify.start(program)
    for index, (one, phase) in enumerate(zip(passes, phases_ending(passes), strict=True)):
        if on_pass is not None:
            on_pass(one.name)
        program = manager.run(index, one, program)
        if phase is not None:
            program = manager.end_phase(phase, program)
    if on_result is not None:
        on_result(program)
    manager.check_cut(program, passes)
    return program, manager.report


def run_passes(
    program: Program, pipeline: Pipeline, *, verify: bool = False
) -> tuple[Program, PipelineReport]:
    """The program after these passes, which stays in the phase it was in, and what they did.

    As `run_pipeline`, but for programs that stand for themselves: no order is required, nothing
    is written to files, and whole runs are compared once, at the end.
    """
    verifier = Verifier() if verify else None
    manager = _Manager(PassContext(), verifier, frozenset(), Path(), None)
    if verifier is not None:
        verifier.start(program)
    for index, one in enumerate(pipeline):
        program = manager.run(index, one, program)
    if verifier is not None:
        line = verifier.check_phase("in all", program)
        manager.report.phases.extend(() if line is None else (line,))
        manager.check_cut(program, list(pipeline))
    return program, manager.report


def known_facts(program: Program) -> frozenset[str]:
    """What may be taken for granted of a program that already is in some phase."""
    if PHASES.index(program.phase) < PHASES.index("canonical"):
        return frozenset()
    facts = {"unit-batch-squeezed", "positions-folded"}
    if PHASES.index(program.phase) >= PHASES.index("fused"):
        facts |= {"norms-fused", "rope-fused", "add-norms-fused"}
    if PHASES.index(program.phase) >= PHASES.index("lowered"):
        facts.add("kv-paged")
    if program.phase == "planned":
        facts.add("planned")
    return frozenset(facts)


def _dump_names(spec: str | Iterable[str] | None, pipeline: Pipeline) -> frozenset[str]:
    names = [spec] if isinstance(spec, str) else list(spec or ())
    if "all" in names:
        return frozenset(pipeline.names())
    for name in names:
        if name not in pipeline.names():
            hint = did_you_mean(name, pipeline.names())
            raise UsageError(f"no pass {name} to dump after", hint=hint)
    return frozenset(names)


@dataclass(slots=True)
class _Manager:
    context: PassContext
    verify: Verifier | None
    dumps: frozenset[str]
    dump_directory: Path
    failure_directory: Path | None
    say_distances: bool = True
    report: PipelineReport = field(default_factory=PipelineReport)
    done: list[str] = field(default_factory=list)

    def run(self, index: int, one: Pass, program: Program) -> Program:
        """One pass, checked, reported and dumped."""
        started = time.perf_counter()
        try:
            result = run_guarded(one, program, self.context)
            checked = self._check(one, program, result)
        except PassError as error:
            raise self._failed(index, one, program, error) from error
        self.report.times.append((one.name, time.perf_counter() - started))
        self.done.append(one.name)
        after = result.program
        self._note_makers(index, program, after)
        if one.contract == "lossy" and result.matches:
            self.report.lossy.append(LossyStage(index, one.name, after))
        self.report.passes.append(
            PassReport(
                one.name,
                one.phase,
                one.contract,
                one.option_values(),
                result.matches,
                tuple(NearMiss(m) if isinstance(m, str) else m for m in result.near_misses),
                len(after.nodes),
                dict(sorted(Counter(node.op for node in after.nodes).items())),
                self._cost_of(program, after),
                checked.text,
                details=result.details,
            )
        )
        if checked.distance is not None:
            self._measured(index, checked.distance)
        if one.name in self.dumps:
            self.dump_directory.mkdir(parents=True, exist_ok=True)
            path = self.dump_directory / f"{index:02d}-{one.name}.ir"
            path.write_text(print_program(after), encoding="utf-8")
        return after

    def _cost_of(self, before: Program, after: Program) -> Cost:
        """Of a step; a pass that changed nothing left it as the pass before it did."""
        if after is before and self.report.passes:
            return self.report.passes[-1].cost
        return step_cost(after)

    def _note_makers(self, index: int, before: Program, after: Program) -> None:
        """A node is new where its label, or the op behind it, was not there before."""
        if after is before:
            return
        old = {(node_label(node), node.op) for node in before.nodes}
        makers = self.report.makers
        self.report.makers = {
            label: index if (label, node.op) not in old else makers[label]
            for node in after.nodes
            if (label := node_label(node)) in makers or (label, node.op) not in old
        }

    def _check(self, one: Pass, before: Program, result: PassResult) -> Checked:
        if result.matches == 0:
            return Checked("unchanged")
        try:
            check_program(result.program)
        except ProgramError as error:
            raise PassError(f"its result is malformed: {error}") from error
        if self.verify is None:
            return Checked("not verified")
        return self.verify.check_pass(one, before, result.program)

    def _measured(self, index: int, distance: Distance) -> None:
        """Note and print how far a lossy pass went."""
        reports = self.report.passes
        reports[index] = replace(reports[index], distance=distance)
        if self.say_distances:
            self.context.log(f"{reports[index].name} is lossy: {distance.text()}")

    def end_phase(self, phase: str, program: Program) -> Program:
        """Move the program to the phase it has reached, and compare whole runs."""
        reached = REACHES[phase]
        if PHASES.index(program.phase) < PHASES.index(reached):
            program = replace(program, phase=reached)
            check_program(program)
        if self.verify is not None:
            with self._timed(f"verify {phase}"):
                line = self.verify.check_phase(phase, program)
            self._say(() if line is None else (line,))
        return program

    def check_cut(self, final: Program, passes: Sequence[Pass]) -> None:
        """Compare runs of a few layers where those of all would take too long."""
        if self.verify is None:
            return
        with self._timed("verify layers"):
            found = self.verify.check_cut(final, passes, self.context)
        for index, distance in found.distances.items():
            self._measured(index, distance)
        self._say(found.lines)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.report.times.append((name, time.perf_counter() - started))

    def _say(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.report.phases.append(line)
            self.context.log(line)

    def _failed(self, index: int, one: Pass, program: Program, error: PassError) -> PassError:
        """The error with the pass, those before it, and where the program it received lies."""
        before = f"passes before: {', '.join(self.done) or 'none'}"
        if self.failure_directory is None:
            return PassError(str(error), where=pass_title(one), hint=before)
        path = self.failure_directory / f"{index:02d}-before-{one.name}.ir"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(print_program(program), encoding="utf-8")
            kept = f"the program it received is in {path}"
        except OSError as problem:
            kept = f"the program it received could not be written: {problem}"
        return PassError(str(error), where=pass_title(one), hint=f"{kept}; {before}")
