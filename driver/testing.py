"""What a plug-in is tested with: rewrites as golden text, kernels against their meaning."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ir.backends import DEFAULT

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from ..codegen.base import Backend
    from ..ir.artifact import Artifact
    from ..ir.program import Program
    from ..ir.targets import Target

PREFIX = "#>"
ROWS = (1, 2, 67)
"""Tokens of the steps that a kernel is run with: one, two, and more than a tile."""
TOLERANCES = {"f32": 2e-6, "bf16": 1e-2}
"""Largest error, relative to the largest magnitude of a row."""
_TOKENS = 128


def check_golden(path: Path, *, update: bool | None = None) -> None:
    """Runs the passes named in a file on its program and compares the result with its text.

    The file contains `# RUN: pass,pass{option=value}`, a program, and the expected text in lines
    that begin with `#>`. With `update`, or with INFC_UPDATE_GOLDEN=1 in the environment, the
    expected text is written instead of compared; review the changes before you commit them.
    Raises AssertionError if the texts differ.
    """
    from ..passes.commands import opt

    run, source, expected = _split(path.read_text(encoding="utf-8"))
    actual = opt(source, run, source=path.name).rstrip("\n")
    if os.environ.get("INFC_UPDATE_GOLDEN") == "1" if update is None else update:
        lines = [f"{PREFIX} {line}".rstrip() for line in actual.splitlines()]
        path.write_text(source.rstrip("\n") + "\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
        return
    assert actual == expected, f"{path.name}: expected\n{expected}\n\nbut got\n{actual}"


def check_fixed_point(path: Path) -> None:
    """Raises AssertionError if running the passes of a file twice differs from once."""
    from ..ir.text import parse_program, print_program
    from ..passes.commands import opt

    run, source, _ = _split(path.read_text(encoding="utf-8"))
    once = opt(source, run, source=path.name)
    assert opt(once, run) == once, f"{path.name}: {run} changes its own result"
    assert print_program(parse_program(once)) == once


def _split(text: str) -> tuple[str, str, str]:
    """The pipeline, the input and the expected text of a case."""
    lines = text.splitlines()
    run = next(line.removeprefix("# RUN: ") for line in lines if line.startswith("# RUN: "))
    source = "\n".join(line for line in lines if not line.startswith(PREFIX))
    expected = [
        line.removeprefix(PREFIX).removeprefix(" ") for line in lines if line.startswith(PREFIX)
    ]
    return run, source, "\n".join(expected)


def check_kernel(
    op: str,
    widths: Sequence[int],
    weights: Sequence[tuple[int, ...]] = (),
    *,
    dtype: str = "f32",
    tolerance: float | None = None,
    target: str = "native",
    backend: str = DEFAULT,
    **attrs: Any,
) -> None:
    """Compares the results of a kernel of a backend with the definition of its op.

    The op is called with a value `[T, width]` for each of `widths`, a weight of each shape in
    `weights`, and `attrs`. The inputs are random. Steps of several sizes run with one thread and
    with two. The result of a row must be the same in all of them, bit for bit, and within
    `tolerance` of the definition. Only ops with a single result of rank 2 are supported.
    """
    import numpy as np

    from ..codegen.registry import get_backend
    from ..passes.pass_manager import run_passes
    from ..passes.pipeline import parse_pipeline

    allowed = TOLERANCES[dtype] if tolerance is None else tolerance
    program = _one_op(op, widths, weights, dtype, attrs)
    compiler = get_backend(backend)
    machine = compiler.find_target(target)
    passes = parse_pipeline(compiler.plan_passes(machine))
    planned, _ = run_passes(program, passes, verify=False)
    ids = np.random.default_rng(5).permutation(_TOKENS)[: max(ROWS)].astype(np.int32)
    expected = _meaning(program, ids)
    with tempfile.TemporaryDirectory() as directory:
        artifact = _build(planned, Path(directory) / "artifact", compiler, machine)
        runs = [_run(artifact, ids[:count], threads) for count in ROWS for threads in (1, 2)]
    for actual in runs:
        rows = len(actual)
        assert np.array_equal(actual, runs[-1][:rows]), f"{op}: a row depends on its neighbours"
        scale = np.abs(expected[:rows]).max(axis=1) + 1e-30
        error = float((np.abs(actual - expected[:rows]).max(axis=1) / scale).max())
        assert error <= allowed, f"{op}: off by {error:.3g} of a row's largest, allowed {allowed:g}"


def _one_op(
    op: str,
    widths: Sequence[int],
    weights: Sequence[tuple[int, ...]],
    dtype: str,
    attrs: Mapping[str, Any],
) -> Program:
    """A lowered program whose logits are the op's result; its operands are rows of tables."""
    from ..ir.builder import ProgramBuilder
    from ..ir.types import DType, Sym, TensorType

    kind, token = DType(dtype), Sym("T")
    b = ProgramBuilder(op, phase="lowered")
    b.symbol("T", 1, max(ROWS))
    ids = b.input("input_ids", TensorType(DType.I64, (token,)))
    b.input("positions", TensorType(DType.I64, (token,)))
    values = [
        b.emit("embedding", b.weight(f"rows{i}", TensorType(kind, (_TOKENS, width))), ids)
        for i, width in enumerate(widths)
    ]
    matrices = [b.weight(f"weight{i}", TensorType(kind, s)) for i, s in enumerate(weights)]
    b.output(b.add(op, (*values, *matrices), attrs).outputs[0])
    tensors = {name: _random(i, w.type) for i, (name, w) in enumerate(b.weights.items())}
    return replace(b.build(), loaders={"checkpoint": tensors.__getitem__})


def _random(seed: int, kind: Any) -> torch.Tensor:
    import torch

    from ..ir.torch_types import to_torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn(kind.shape, generator=generator).to(to_torch(kind.dtype))


def _meaning(program: Program, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    import torch

    from ..ir.interpret import interpret
    from ..ir.weights import program_weights

    inputs = {"input_ids": torch.from_numpy(ids).long(), "positions": torch.arange(len(ids))}
    (result,) = interpret(program, inputs, program_weights(program))
    rows: NDArray[np.float32] = result.float().numpy()
    return rows


def _build(program: Program, directory: Path, backend: Backend, machine: Target) -> Artifact:
    from ..codegen.base import EmitOptions
    from ..ir.artifact import ArtifactWriter, open_artifact
    from ..ir.manifest import MAIN, Limits, Manifest, TargetMachine
    from ..ir.program import vocabulary_size

    width = vocabulary_size(program)
    assert width is not None, "the result has rows of a known length"
    limits = Limits(max(ROWS), max(ROWS), 1, max(ROWS))
    with ArtifactWriter(directory) as writer:
        emission = backend.emit(program, machine, writer.path, EmitOptions())
        writer.commit(
            Manifest(
                infc_version="0",
                recipe={},
                model=replace(program.spec, vocab_size=width),
                backend=backend.name,
                target=TargetMachine(machine.name, machine.features),
                programs={MAIN: emission.compiled(program, limits)},
                tokenizer=None,
            )
        )
    return open_artifact(directory)


def _run(artifact: Artifact, ids: NDArray[np.int32], threads: int) -> NDArray[np.float32]:
    import numpy as np

    from ..runtime.executors.base import ExecutorConfig, run_step
    from ..runtime.scheduling.step import Step

    count = len(ids)
    places = np.arange(count, dtype=np.int32)
    step = Step(
        token_ids=ids,
        positions=places,
        query_starts=np.array([0, count], np.int32),
        context_lengths=np.array([count], np.int32),
        block_tables=(),
        slots=(),
        block_copies=(),
        logits_index=places,
    )
    with _open(artifact, ExecutorConfig(num_blocks=(), num_threads=threads)) as executor:
        return run_step(executor, step).logits


@contextmanager
def _open(artifact: Artifact, config: Any) -> Iterator[Any]:
    from ..runtime.executors import open_executor

    executor = open_executor(artifact, config)
    try:
        yield executor
    finally:
        executor.close()
