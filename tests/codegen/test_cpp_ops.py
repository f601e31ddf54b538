"""Every op that needs no KV cache: generated C++ against the op's meaning."""

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
from infc.passes.base import PassContext
from infc.passes.group_loops import GroupLoops
from infc.runtime.executors.base import run_step

from .harness import Chunk, build, make_step, open_cpp
from .op_cases import (
    CASES,
    VOCAB,
    Case,
    gates,
    grouped_routing,
    linear_bias,
    program_of,
    routing,
    row_norm,
    sum_of_one,
)

pytestmark = pytest.mark.usefixtures("as_shipped")


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16], ids=lambda d: d.value)
@pytest.mark.parametrize("make", CASES, ids=lambda f: f.__name__)
def test_generated_code_means_what_the_ops_mean(
    make: Callable[[Case], Value], dtype: DType, tmp_path: Path
) -> None:
    bound = 2e-6 if dtype is DType.F32 else 2e-2
    _compare(program_of(make, dtype), bound, tmp_path)


@pytest.mark.parametrize(
    "make", [linear_bias, gates, routing, grouped_routing], ids=lambda f: f.__name__
)
def test_rows_of_floats_are_rounded_where_they_meet_narrow_matrices(
    make: Callable[[Case], Value], tmp_path: Path
) -> None:
    program = program_of(make, DType.F32, DType.BF16)
    assert program.outputs[0].type.dtype is DType.F32
    _compare(program, 2e-3, tmp_path)


def _compare(program: Program, bound: float, tmp_path: Path) -> None:
    """Generated code against the meaning, with one thread and several."""
    ids = np.random.default_rng(5).integers(0, VOCAB, 23)
    inputs = {"input_ids": torch.tensor(ids), "positions": torch.arange(23)}
    (expected,) = interpret(program, inputs, program_weights(program))
    artifact = build(program, tmp_path / "a")
    executor = open_cpp(artifact)
    step = make_step([Chunk(list(ids), 0, [1, 2])], num_groups=0, block_size=16)
    actual = torch.from_numpy(run_step(executor, step).logits)
    one_thread = open_cpp(artifact, num_threads=1)
    assert np.array_equal(run_step(one_thread, step).logits, actual.numpy())
    scale = expected.float().abs().max()
    assert ((actual - expected.float()).abs().max() / scale) < bound


@pytest.mark.parametrize("make", [sum_of_one, row_norm], ids=lambda f: f.__name__)
def test_grouped_loops_mean_what_single_ones_mean(
    make: Callable[[Case], Value], tmp_path: Path
) -> None:
    program = program_of(make, DType.F32)
    grouped = GroupLoops().run(program, PassContext()).program
    assert grouped.attrs["loops"], "nothing was grouped"
    step = make_step([Chunk(list(range(23)), 0, [1, 2])], num_groups=0, block_size=16)
    single = run_step(open_cpp(build(program, tmp_path / "single")), step).logits
    assert np.array_equal(
        run_step(open_cpp(build(grouped, tmp_path / "grouped")), step).logits, single
    )
