"""Programs that an artifact has beside the model's step: optimized, and compiled into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..ir.errors import ProgramError, UsageError
from ..ir.manifest import (
    MAIN,
    CompiledProgram,
    Limits,
    Manifest,
    canonical_json,
    folder_of,
)
from ..ir.manifest_values import is_program_name
from .progress import Reporter

if TYPE_CHECKING:
    from ..codegen.base import SharedWeights
    from ..ir.program import Program
    from ..ir.quantized_pairs import QuantizedPairs
    from ..passes.methods.calibration import Calibration
    from ..passes.pattern_uses import PatternUses
    from ..passes.pipeline import Pipeline
    from .compile_job import CompileJob, Dumps


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedProgram:
    """One more program of an artifact, such as a head that drafts, or a part for another device.

    `make` is given the program of the model as it was captured, and returns another one in the
    phase `captured`, which may have other inputs and outputs. The bounds of its symbols are its
    limits. Without a spec of its own, it has that of the model. A weight that it takes over from
    the model with its definition, and that passes treat alike, is not stored again; so builders
    should start from the model's `loaders`. `rank` says which part of a step it is, where several
    devices compute one.
    """

    make: Callable[[Program], Program]
    rank: int | None = None


def check_names(programs: Mapping[str, AddedProgram]) -> None:
    """UsageError for a name that a program beside the model's step cannot have."""
    for name in programs:
        if name == MAIN:
            raise UsageError(f"{MAIN} is the model's own program", hint="choose another name")
        if not is_program_name(name):
            raise UsageError(
                f"{name!r} cannot be the name of a program",
                hint="use lower-case letters, digits, hyphens and underscores",
            )


@dataclass(frozen=True, slots=True)
class ProgramCompiler:
    """Compiles programs into an artifact's directory, after its main one.

    What `calibration` made of weights of the model is taken over where these are the same.
    `patterns` of quantization rules may match in any of the programs.
    """

    job: CompileJob
    pipeline: Pipeline
    directory: Path
    shared: SharedWeights
    pairs: QuantizedPairs
    calibration: Calibration | None
    patterns: PatternUses | None
    dumps: Dumps
    progress: Reporter

    def add_to(self, manifest: Manifest, captured: Program) -> Manifest:
        """The manifest with the programs of the job, of which each is compiled here.

        `captured` is the model's program. Raises what `compile` does, and UsageError for a pattern
        that was used in no program.
        """
        limits = manifest.main.limits
        added = {
            name: self.compile(name, one, captured, limits)
            for name, one in self.job.programs.items()
        }
        if self.patterns is not None:
            self.patterns.require_all_used()
        return replace(manifest, programs={**manifest.programs, **added})

    def compile(
        self, name: str, added: AddedProgram, captured: Program, main: Limits
    ) -> CompiledProgram:
        """Write a program's files; what the manifest says of it.

        `captured` is the model's program, `main` its limits. ProgramError for what is no program,
        or one that the backend refuses.
        """
        from ..codegen.base import EmitOptions
        from ..ir.program import EMPTY_SPEC, Program
        from ..ir.text import print_program
        from ..ir.verify import verify
        from .optimize import optimize

        job, calibration = self.job, self.calibration
        if calibration is not None:
            calibration = replace(calibration, is_added=True)
        folder = self.directory / folder_of(name)
        folder.mkdir(parents=True)
        first = added.make(captured)
        if not isinstance(first, Program):
            message = f"the program {name} is a {type(first).__name__}, expected a Program"
            raise UsageError(message, hint="`make` takes the model's program and returns another")
        if first.spec == EMPTY_SPEC:
            first = replace(first, spec=captured.spec)
        verify(first)
        if first.phase != captured.phase:
            message = f"the program {name} is in the phase {first.phase}, expected {captured.phase}"
            raise ProgramError(message)
        with self.progress.stage(f"run the passes on {name}"):
            optimized = optimize(
                first,
                self.pipeline,
                job.target,
                verify=job.verify,
                dump_ir_after=self.dumps.after,
                dump_dir=self.dumps.directory / name,
                progress=self.progress,
                pairs=self.pairs,
                calibration=calibration,
                patterns=self.patterns,
                say_distances=False,
            )
        program = optimized.program
        job.backend.check(program, job.target)
        with self.progress.stage(f"emit code and weights of {name}"):
            options = EmitOptions(pairs=self.pairs, shared=self.shared)
            emission = job.backend.emit(program, job.target, folder, options)
        for file, text in {
            "captured.ir": print_program(first),
            "program.ir": print_program(program),
            "report.json": canonical_json(optimized.report),
        }.items():
            (folder / file).write_text(text, encoding="utf-8")
        return emission.compiled(
            program,
            _limits(program, main),
            folder=folder_of(name),
            shared=self.shared,
            rank=added.rank,
        )


def _limits(program: Program, main: Limits) -> Limits:
    """The bounds of a program's own symbols; those of the model where it has none."""
    bounds = {name: bound.high for name, bound in program.symbols.items()}
    return Limits(
        max_context=program.spec.max_context or main.max_context,
        step_tokens=bounds.get("T", main.step_tokens),
        max_sequences=main.max_sequences,
        logit_rows=bounds.get("R", main.logit_rows),
    )
