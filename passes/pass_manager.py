"""Runs a pipeline: times, reports, dumps and verifies what each pass did."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..ir.analyses import node_label, total_cost
from ..ir.errors import InfcError, PassError, ProgramError, UsageError
from ..ir.ops import PHASES
from ..ir.ops.base import Cost
from ..ir.program import Program
from ..ir.quantized_pairs import QuantizedPairs
from ..ir.text import print_program
from ..ir.verify import verify as check_program
from .base import PIPELINE_PHASES, REACHES, Pass, PassContext, PassResult
from .pipeline import Pipeline
from .verification import Verifier


@dataclass(frozen=True, slots=True)
class PassReport:
    """What one pass did. `cost` is of one step at the upper bounds of all symbols.

    `ops` counts the nodes of the program it left by op.
    """

    name: str
    phase: str
    contract: str
    options: Mapping[str, Any]
    matches: int
    near_misses: tuple[str, ...]
    nodes: int
    ops: Mapping[str, int]
    cost: Cost
    verified: str

    def as_data(self) -> dict[str, Any]:
        """As plain data, for `report.json`."""
        return {
            "name": self.name,
            "phase": self.phase,
            "contract": self.contract,
            "options": dict(self.options),
            "matches": self.matches,
            "near_misses": list(self.near_misses),
            "nodes": self.nodes,
            "ops": dict(self.ops),
            "bytes_read": self.cost.bytes_read,
            "bytes_written": self.cost.bytes_written,
            "operations": self.cost.flops,
            "verified": self.verified,
        }


@dataclass(slots=True)
class PipelineReport:
    """What a whole pipeline did; times (seconds by pass, in order) are kept apart.

    `makers` says of each node that is left, by its label, which pass (its place in `passes`)
    made it; nodes that are not in it were captured.
    """

    passes: list[PassReport] = field(default_factory=list)
    phases: list[str] = field(default_factory=list)
    times: list[tuple[str, float]] = field(default_factory=list)
    makers: dict[str, int] = field(default_factory=dict)

    def as_data(self) -> dict[str, Any]:
        """As plain data without times, so that equal compiles report equally."""
        made: dict[int, list[str]] = {}
        for label, index in self.makers.items():
            made.setdefault(index, []).append(label)
        passes = [{**one.as_data(), "made": made.get(i, [])} for i, one in enumerate(self.passes)]
        return {"passes": passes, "verification": self.phases}


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
    pairs: QuantizedPairs | None = None,
) -> tuple[Program, PipelineReport]:
    """The program after every pass, and what they did.

    The program is checked after each pass that changed it; with `verify` its numbers too.
    `dump_ir_after` names passes ("all": every one) whose result is written to `dump_directory` as
    `03-fuse-rope.ir`. `on_pass` is told each pass before it runs. Runs that compare programs
    take codes and scales of matrices from `pairs`. PassError names a pass that failed; the program
    it received is then in `failure_directory`. UsageError for a wrong order.
    """
    manager = _Manager(
        context or PassContext(),
        verify=Verifier(context.log if context else None, pairs) if verify else None,
        dumps=_dump_names(dump_ir_after, pipeline),
        dump_directory=Path(dump_directory),
        failure_directory=Path(failure_directory),
    )
    pipeline.check(known_facts(program))
    passes = list(pipeline)
    for index, one in enumerate(passes):
        if on_pass is not None:
            on_pass(one.name)
        program = manager.run(index, one, program)
        if index + 1 == len(passes) or _rank(passes[index + 1]) > manager.rank:
            program = manager.end_phase(program, final=index + 1 == len(passes))
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


def _rank(one: Pass) -> int:
    return PIPELINE_PHASES.index(one.phase)


def _dump_names(spec: str | Iterable[str] | None, pipeline: Pipeline) -> frozenset[str]:
    names = [spec] if isinstance(spec, str) else list(spec or ())
    if "all" in names:
        return frozenset(pipeline.names())
    for name in names:
        if name not in pipeline.names():
            import difflib

            near = difflib.get_close_matches(name, pipeline.names(), 1)
            raise UsageError(
                f"no pass {name} to dump after", hint=f"did you mean {near[0]}?" if near else None
            )
    return frozenset(names)


@dataclass(slots=True)
class _Manager:
    context: PassContext
    verify: Verifier | None
    dumps: frozenset[str]
    dump_directory: Path
    failure_directory: Path
    report: PipelineReport = field(default_factory=PipelineReport)
    rank: int = 0
    done: list[str] = field(default_factory=list)

    def run(self, index: int, one: Pass, program: Program) -> Program:
        """One pass, checked, reported and dumped."""
        started = time.perf_counter()
        # A pass that stands again in a later phase does not end that phase.
        self.rank = max(self.rank, _rank(one))
        try:
            result = self._guarded(one, program)
            verified = self._check(one, program, result)
        except PassError as error:
            raise self._failed(index, one, program, error) from error
        self.report.times.append((one.name, time.perf_counter() - started))
        self.done.append(one.name)
        after = result.program
        self._note_makers(index, program, after)
        self.report.passes.append(
            PassReport(
                one.name,
                one.phase,
                one.contract,
                one.option_values(),
                result.matches,
                result.near_misses,
                len(after.nodes),
                dict(sorted(Counter(node.op for node in after.nodes).items())),
                self._cost_of(program, after),
                verified,
            )
        )
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

    def _guarded(self, one: Pass, program: Program) -> PassResult:
        try:
            result = one.run(program, self.context)
        except UsageError:
            raise
        except PassError:
            raise
        except InfcError as error:
            raise PassError(str(error)) from error
        except Exception as error:  # a user's pass may raise anything; its name must not be lost
            raise PassError(f"{type(error).__name__}: {error}") from error
        if (result.matches == 0) != (result.program is program):
            raise PassError("says that nothing matched, and changed the program (or the reverse)")
        return result

    def _check(self, one: Pass, before: Program, result: PassResult) -> str:
        if result.matches == 0:
            return "unchanged"
        try:
            check_program(result.program)
        except ProgramError as error:
            raise PassError(f"its result is malformed: {error}") from error
        if self.verify is None:
            return "not verified"
        return self.verify.check_pass(one, before, result.program)

    def end_phase(self, program: Program, *, final: bool) -> Program:
        """Move the program to the phase it has reached, and compare whole runs."""
        reached = REACHES[PIPELINE_PHASES[self.rank]]
        if PHASES.index(program.phase) < PHASES.index(reached):
            program = replace(program, phase=reached)
            check_program(program)
        if self.verify is not None:
            started = time.perf_counter()
            line = self.verify.check_phase(PIPELINE_PHASES[self.rank], program, final=final)
            self.report.times.append(
                (f"verify {PIPELINE_PHASES[self.rank]}", time.perf_counter() - started)
            )
            self.report.phases.append(line)
            self.context.log(line)
        return program

    def _failed(self, index: int, one: Pass, program: Program, error: PassError) -> PassError:
        """The error with the pass, those before it, and where the program it received lies."""
        path = self.failure_directory / f"{index:02d}-before-{one.name}.ir"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(print_program(program), encoding="utf-8")
            kept = f"the program it received is in {path}"
        except OSError as problem:
            kept = f"the program it received could not be written: {problem}"
        before = ", ".join(self.done) or "none"
        return PassError(
            str(error), where=f"pass {one.name}", hint=f"{kept}; passes before: {before}"
        )


def step_cost(program: Program) -> Cost:
    """What one step costs at the upper bounds of all symbols."""
    return total_cost(program, {name: bound.high for name, bound in program.symbols.items()})
