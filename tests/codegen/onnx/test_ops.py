"""Every op that needs no KV cache: models in ONNX against the op's meaning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from infc.ir.interpret import interpret
from infc.ir.program import Program, Value
from infc.ir.types import DType
from infc.ir.weights import program_weights
from infc.runtime.executors import open_executor
from infc.runtime.executors.base import ExecutorConfig, run_step

from ..harness import Chunk, build, make_step
from ..op_cases import CASES, VOCAB, Case, gates, grouped_routing, linear_bias, program_of, routing


def _error(program: Program, directory: Path) -> float:
    ids = np.random.default_rng(5).integers(0, VOCAB, 23)
    inputs = {"input_ids": torch.tensor(ids), "positions": torch.arange(23)}
    (expected,) = interpret(program, inputs, program_weights(program))
    executor = open_executor(
        build(program, directory / "a", backend="onnx"), ExecutorConfig(num_blocks=())
    )
    step = make_step([Chunk(list(ids), 0, [1, 2])], num_groups=0, block_size=16)
    actual = torch.from_numpy(run_step(executor, step).logits)
    executor.close()
    return float((actual - expected.float()).abs().max() / expected.float().abs().max())


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16], ids=lambda d: d.value)
@pytest.mark.parametrize("make", CASES, ids=lambda f: f.__name__)
def test_models_mean_what_the_ops_mean(
    make: Callable[[Case], Value], dtype: DType, tmp_path: Path
) -> None:
    bound = 2e-6 if dtype is DType.F32 else 2e-2
    assert _error(program_of(make, dtype), tmp_path) < bound


@pytest.mark.parametrize(
    "make", [linear_bias, gates, routing, grouped_routing], ids=lambda f: f.__name__
)
def test_rows_of_floats_are_rounded_where_they_meet_narrow_matrices(
    make: Callable[[Case], Value], tmp_path: Path
) -> None:
    assert _error(program_of(make, DType.F32, DType.BF16), tmp_path) < 2e-3
