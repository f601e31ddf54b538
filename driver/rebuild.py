"""Rebuilds an artifact for another target, from the source code and weights that it contains."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from ..ir.artifact import Artifact, ArtifactWriter, open_artifact
from ..ir.files import share_file
from ..ir.manifest import MAIN, Manifest, TargetMachine
from ..ir.targets import Target, check_platform, resolve_target
from .default_output import keep_another_checkpoint
from .progress import Reporter


def rebuild_artifact(
    path: str | os.PathLike[str],
    target: str = "native",
    output: str | os.PathLike[str] | None = None,
    *,
    progress: Reporter | None = None,
) -> Artifact:
    """Compiles an artifact for another target, and opens the result.

    All files of the artifact are verified first. By default, `output` is named after the artifact
    and the target, in the working directory, and does not replace an artifact of another
    checkpoint. It can be the artifact itself. The result is byte for byte the same as compiling
    the model for this target.

    Raises TargetError for an unknown target, ToolchainError where there is no compiler or it
    fails, UsageError for a backend that knows no targets, ArtifactError where the source is not
    what this infc generates, or the result cannot be written.
    """
    check_platform()
    progress = progress or Reporter()
    chosen = resolve_target(target)
    with progress.stage("check the artifact"):
        old = open_artifact(path, "full")
    place = Path(output) if output is not None else _default_output(old, chosen)
    with ArtifactWriter(place) as writer:
        manifest = _build(old, chosen, writer.path, progress)
        with progress.stage("digest and move into place"):
            writer.commit(manifest)
    return open_artifact(writer.destination, "none")  # its digests are of what was just written


def _default_output(old: Artifact, target: Target) -> Path:
    name = old.path.resolve().name.removesuffix(".infc")
    output = Path(f"{name}-{target.name}.infc")
    keep_another_checkpoint(
        output, lambda: old.manifest.checkpoint, hint="name another output with -o"
    )
    return output


def _build(old: Artifact, target: Target, directory: Path, progress: Reporter) -> Manifest:
    from ..codegen.base import EmitOptions, Made
    from ..codegen.registry import get_backend
    from ..ir.safetensors import MappedSafetensors
    from ..ir.text import parse_program

    manifest = old.manifest
    backend = get_backend(manifest.backend, manifest.recipe)
    source = old.path / "program.ir"
    program = parse_program(source.read_text(encoding="utf-8"), source=str(source))
    before = Target(manifest.target.name, manifest.target.features)
    mapped = MappedSafetensors(old.weights_path, give_back=True)
    try:
        with progress.stage("build code and weights"):
            emission = backend.rebuild(
                program,
                Made(before, old.path, mapped.array),
                target,
                directory,
                EmitOptions(on_weight=progress.advance),
            )
    finally:
        mapped.close()
    for name in manifest.files:
        if not (directory / name).exists():  # what no target changes: tokenizer, programs, report
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            share_file(old.path / name, directory / name)
    return replace(
        manifest,
        recipe={**manifest.recipe, "target": target.name},
        target=TargetMachine(target.name, target.features),
        programs={MAIN: emission.compiled(program, manifest.main.limits)},
    )
