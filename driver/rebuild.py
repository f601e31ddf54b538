"""Rebuilds an artifact for another target, from the source code and weights that it contains."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..ir.artifact import Artifact, ArtifactWriter, open_artifact
from ..ir.files import share_file
from ..ir.manifest import MAIN, CompiledProgram, Manifest, TargetMachine, folder_of
from ..ir.targets import Target, check_platform
from .default_output import keep_another_checkpoint
from .progress import Reporter, as_reporter

if TYPE_CHECKING:
    from ..codegen.base import Backend
    from ..ir.program import Program, Weight


def rebuild_artifact(
    path: str | os.PathLike[str],
    target: str = "native",
    output: str | os.PathLike[str] | None = None,
    *,
    progress: Reporter | bool = False,
) -> Artifact:
    """Compiles an artifact for another target, and opens the result.

    All files of the artifact are verified first. By default, `output` is named after the artifact
    and the target, in the working directory, and does not replace an artifact of another
    checkpoint. It can be the artifact itself. The result is byte for byte the same as compiling
    the model for this target. `progress` is as in `compile_model`, by default silent.

    Raises TargetError for an unknown target, ToolchainError where there is no compiler (for GPUs,
    no Triton) or it fails, UsageError for a backend that knows no targets, ArtifactError where the
    source is not what this infc generates, or the result cannot be written.
    """
    check_platform()
    progress = as_reporter(progress)
    with progress.stage("check the artifact"):
        old = open_artifact(path, "full")
    chosen = _find_target(old.manifest, target)
    place = Path(output) if output is not None else _default_output(old, chosen)
    with ArtifactWriter(place) as writer:
        manifest = _build(old, chosen, writer.path, progress)
        with progress.stage("digest and move into place"):
            writer.commit(manifest)
    return open_artifact(writer.destination, "none")  # its digests are of what was just written


def _find_target(manifest: Manifest, text: str) -> Target:
    from ..codegen.registry import get_backend

    return get_backend(manifest.backend, manifest.recipe).find_target(text)


def _default_output(old: Artifact, target: Target) -> Path:
    name = old.path.resolve().name.removesuffix(".infc")
    output = Path(f"{name}-{target.name}.infc")
    keep_another_checkpoint(
        output, lambda: old.manifest.checkpoint, hint="name another output with -o"
    )
    return output


def _build(old: Artifact, target: Target, directory: Path, progress: Reporter) -> Manifest:
    from ..codegen.registry import get_backend

    manifest = old.manifest
    rebuilder = _Rebuilder(old, get_backend(manifest.backend, manifest.recipe), target, directory)
    programs: dict[str, CompiledProgram] = {}
    with progress.stage("build code and weights"):
        for name in (MAIN, *(name for name in manifest.programs if name != MAIN)):
            programs[name] = rebuilder.build(name, progress)
    code = tuple(f"{folder_of(name)}code/" for name in programs)
    for name in manifest.files:
        # What no target changes: tokenizer, programs, report. Code of the other target may have
        # files of other names.
        if not name.startswith(code) and not (directory / name).exists():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            share_file(old.path / name, directory / name)
    return replace(
        manifest,
        recipe={**manifest.recipe, "target": target.name},
        target=TargetMachine(target.name, target.features),
        programs=programs,
    )


@dataclass(slots=True)
class _Rebuilder:
    """Rebuilds an artifact's programs, the main one first."""

    old: Artifact
    backend: Backend
    target: Target
    directory: Path
    main: tuple[Program, tuple[Weight, ...]] | None = None

    def build(self, name: str, progress: Reporter) -> CompiledProgram:
        """Write a program's code and weights; what the manifest says of it."""
        from ..codegen.base import EmitOptions, Made, SharedWeights
        from ..ir.safetensors import MappedSafetensors
        from ..ir.text import parse_program

        said, folder = self.old.manifest.programs[name], folder_of(name)
        machine = self.old.manifest.target
        source = f"{folder}program.ir"
        program = parse_program(self.old.read_text(source), source=str(self.old.path / source))
        shared = None
        if self.main is not None:
            common = frozenset(said.weights.shared)
            shared = SharedWeights(self.main[0], {w.name: w for w in self.main[1]}, common)
        (self.directory / folder).mkdir(parents=True, exist_ok=True)
        mapped = MappedSafetensors(self.old.path / said.weights.file, give_back=True)
        try:
            made = Made(
                Target(machine.name, machine.features), self.old.path / folder, mapped.array
            )
            options = EmitOptions(on_weight=progress.advance, shared=shared)
            place = self.directory / folder
            emission = self.backend.rebuild(program, made, self.target, place, options)
        finally:
            mapped.close()
        if self.main is None:
            self.main = program, emission.weights
        return emission.compiled(program, said.limits, folder=folder, shared=shared, rank=said.rank)
