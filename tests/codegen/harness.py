"""Runs small programs through the cpp backend and through the ops' meanings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from infc.codegen.base import EmitOptions
from infc.codegen.registry import get_backend
from infc.ir.artifact import Artifact, ArtifactWriter, open_artifact
from infc.ir.manifest import MAIN, CompiledProgram, Limits, Manifest, TargetMachine
from infc.ir.program import Program, vocabulary_size
from infc.ir.targets import Target, resolve_target
from infc.ir.text import print_program
from infc.ir.types import DType
from infc.runtime.executors.base import ExecutorConfig
from infc.runtime.executors.cpp import CppExecutor

from .chunks import Chunk as Chunk
from .chunks import make_step as make_step


def random_weights(program: Program, seed: int) -> dict[str, torch.Tensor]:
    """A tensor for each weight of the table, in its type; codes are -127 .. 127."""
    generator = torch.Generator().manual_seed(seed)
    names = {
        "f32": torch.float32,
        "bf16": torch.bfloat16,
        "f16": torch.float16,
    }
    tensors = {}
    for name, weight in program.weights.items():
        shape = [int(str(d)) for d in weight.type.shape]
        if weight.type.dtype is DType.I8:
            tensors[name] = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        else:
            values = torch.randn(shape, generator=generator)
            tensors[name] = values.to(names[weight.type.dtype.value])
    return tensors


def with_weights(program: Program, weights: Mapping[str, torch.Tensor]) -> Program:
    """The program with a loader for its checkpoint tensors."""
    return replace(program, loaders={"checkpoint": weights.__getitem__})


def build(
    program: Program,
    directory: Path,
    target: Target | None = None,
    *,
    backend: str = "cpp",
    beside: Mapping[str, Program] | None = None,
) -> Artifact:
    """Emit lowered programs as an artifact: the main one, and others by name."""
    target = target or resolve_target("native")
    width = vocabulary_size(program)
    assert width is not None
    with ArtifactWriter(directory) as writer:
        programs = {MAIN: _emit(program, writer.path, "", backend, target)}
        for name, other in (beside or {}).items():
            programs[name] = _emit(other, writer.path, f"programs/{name}/", backend, target)
        writer.commit(
            Manifest(
                infc_version="0",
                recipe={},
                model=replace(program.spec, vocab_size=width),
                backend=backend,
                target=TargetMachine(target.name, target.features),
                programs=programs,
                tokenizer=None,
            )
        )
    return open_artifact(directory)


def _emit(
    program: Program, root: Path, folder: str, backend: str, target: Target
) -> CompiledProgram:
    bounds = {name: bound.high for name, bound in program.symbols.items()}
    limits = Limits(
        max_context=program.spec.max_context or 4096,
        step_tokens=bounds.get("T", 1),
        max_sequences=64,
        logit_rows=bounds.get("R", 4096),
    )
    place = root / folder
    place.mkdir(parents=True, exist_ok=True)
    emission = get_backend(backend).emit(program, target, place, EmitOptions())
    (place / "program.ir").write_text(print_program(program), encoding="utf-8")
    return emission.compiled(program, limits, folder=folder)


def open_cpp(
    artifact: Artifact, *, num_blocks: int = 64, num_threads: int = 2, profile: bool = False
) -> CppExecutor:
    """An executor with as many blocks in every group."""
    blocks = (num_blocks,) * len(artifact.manifest.main.resources)
    config = ExecutorConfig(num_blocks=blocks, num_threads=num_threads, profile=profile)
    return CppExecutor(artifact, config)
