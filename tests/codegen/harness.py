"""Runs small programs through the cpp backend and through the ops' meanings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

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
from infc.runtime.scheduling.step import Step


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


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence that a step computes: ids and the position of the first."""

    ids: Sequence[int]
    start: int
    blocks: Sequence[int]
    """Ids of the sequence's blocks, the same for every KV group."""


def make_step(
    chunks: Sequence[Chunk], *, num_groups: int, block_size: int, rows: Sequence[int] | None = None
) -> Step:
    """A step over chunks; by default every row's logits are wanted."""
    ids = [token for chunk in chunks for token in chunk.ids]
    positions = [chunk.start + i for chunk in chunks for i in range(len(chunk.ids))]
    starts = np.cumsum([0, *(len(chunk.ids) for chunk in chunks)])
    width = max((len(chunk.blocks) for chunk in chunks), default=1)
    table = [[*chunk.blocks, *[0] * (width - len(chunk.blocks))] for chunk in chunks]
    slots = [
        chunk.blocks[p // block_size] * block_size + p % block_size
        for chunk in chunks
        for p in range(chunk.start, chunk.start + len(chunk.ids))
    ]
    return Step(
        token_ids=_ints(ids),
        positions=_ints(positions),
        query_starts=_ints(starts),
        context_lengths=_ints([chunk.start + len(chunk.ids) for chunk in chunks]),
        block_tables=(_ints(table).reshape(len(chunks), width),) * num_groups,
        slots=(_ints(slots),) * num_groups,
        block_copies=(np.zeros((0, 2), dtype=np.int32),) * num_groups,
        logits_index=_ints(range(len(ids)) if rows is None else rows),
    )


def _ints(values: object) -> NDArray[np.int32]:
    array = np.asarray(list(values) if isinstance(values, range) else values, dtype=np.int32)
    return np.ascontiguousarray(array)


def open_cpp(
    artifact: Artifact, *, num_blocks: int = 64, num_threads: int = 2, profile: bool = False
) -> CppExecutor:
    """An executor with as many blocks in every group."""
    blocks = (num_blocks,) * len(artifact.manifest.main.resources)
    config = ExecutorConfig(num_blocks=blocks, num_threads=num_threads, profile=profile)
    return CppExecutor(artifact, config)
