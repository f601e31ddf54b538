"""Ops by the kernels' own text, in Triton's interpreter, against their meanings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from infc.ir.builder import ProgramBuilder
from infc.ir.interpret import interpret
from infc.ir.launches import Pointer
from infc.ir.paged_state import PagedState
from infc.ir.program import Program, Value
from infc.ir.types import DType, Sym, TensorType
from infc.ir.weights import program_weights
from infc.passes.base import PassContext
from infc.passes.group_loops import GroupLoops

from ..harness import Chunk, make_step, random_weights, with_weights
from ..op_cases import (
    CASES,
    VOCAB,
    Case,
    gates,
    grouped_routing,
    linear_bias,
    program_of,
    row_norm,
    sum_of_one,
)
from ..test_cpp_quantized import Products, cached, routed
from .interpreting import Interpreting
from .running import Runner

TOKENS = 19


def outcome(program: Program, process: Interpreting) -> tuple[np.ndarray, np.ndarray]:
    """What the kernels give and what the ops mean."""
    ids = np.random.default_rng(5).integers(0, VOCAB, TOKENS)
    inputs = {"input_ids": torch.tensor(ids)}
    if any(value.name == "positions" for value in program.inputs):
        inputs["positions"] = torch.arange(TOKENS)
    (wanted,) = interpret(program, inputs, program_weights(program))
    step = make_step([Chunk(ids.tolist(), 0, [1, 2])], num_groups=0, block_size=16)
    found = Runner(program, program_weights(program), process).run(step)
    return found.logits, wanted.float().numpy()


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    assert np.isfinite(wanted).all() and wanted.any()
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16], ids=lambda d: d.value)
@pytest.mark.parametrize("make", CASES, ids=lambda f: f.__name__)
def test_kernels_mean_what_the_ops_mean(
    make: Callable[[Case], Value], dtype: DType, interpreting: Interpreting
) -> None:
    found = outcome(program_of(make, dtype), interpreting)
    assert error(*found) < (3e-6 if dtype is DType.F32 else 2e-2)


@pytest.mark.parametrize("make", [linear_bias, gates, grouped_routing], ids=lambda f: f.__name__)
def test_rows_of_floats_are_rounded_where_they_meet_narrow_matrices(
    make: Callable[[Case], Value], interpreting: Interpreting
) -> None:
    program = program_of(make, DType.F32, DType.BF16)
    assert error(*outcome(program, interpreting)) < 2e-3


@pytest.mark.parametrize("make", [sum_of_one, row_norm], ids=lambda f: f.__name__)
def test_grouped_loops_mean_what_single_ones_mean(
    make: Callable[[Case], Value], interpreting: Interpreting
) -> None:
    program = program_of(make, DType.F32)
    grouped = GroupLoops().run(program, PassContext()).program
    assert grouped.attrs["loops"], "nothing was grouped"
    both = [outcome(one, interpreting)[0] for one in (program, grouped)]
    assert error(*both) < 1e-6


def wide_reductions(c: Case) -> Value:
    """Rows that no block holds."""
    wide = c.op("linear", c.x, c.matrix("w", 20_000, 37))
    top = c.op("amax", wide, dims=(1,), keepdim=True)
    mean = c.op("mean", c.op("neg", wide), dims=(1,), keepdim=True)
    return c.op("add", c.x, c.op("mul", top, mean))


def test_rows_that_no_block_holds_are_reduced_in_parts(interpreting: Interpreting) -> None:
    assert error(*outcome(program_of(wide_reductions, DType.F32), interpreting)) < 1e-5


def test_a_nan_is_the_largest(interpreting: Interpreting) -> None:
    def make(c: Case) -> Value:
        root = c.op("sqrt", c.x)
        return c.op("add", c.x, c.op("amax", root, dims=(1,), keepdim=True))

    found, wanted = outcome(program_of(make, DType.F32), interpreting)
    assert np.isnan(wanted).any()
    assert np.array_equal(np.isnan(found), np.isnan(wanted))


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16], ids=lambda d: d.value)
def test_products_of_codes_have_the_bits_of_their_meaning(
    dtype: DType, interpreting: Interpreting
) -> None:
    found, wanted = outcome(Products(dtype).program(), interpreting)
    assert np.array_equal(found, wanted)


@pytest.mark.parametrize("biased", [False, True])
def test_experts_of_codes_mean_what_the_ops_mean(biased: bool, interpreting: Interpreting) -> None:
    assert error(*outcome(routed(DType.F32, biased=biased), interpreting)) < 1e-5


def test_attention_over_codes_means_what_the_ops_mean(interpreting: Interpreting) -> None:
    program = cached(DType.F32)
    program = replace(program, spec=replace(program.spec, max_context=64))
    ids = np.random.default_rng(6).integers(0, VOCAB, 45)
    state = PagedState.allocate(program.resources, 8)
    runner = Runner(program, program_weights(program), interpreting, num_blocks=8)
    for first, last in ((0, 20), (20, 44), (44, 45)):
        positions = torch.arange(first, last)
        state.set_step(
            *(positions, torch.tensor([0, last - first]), torch.tensor([last])),
            {"kv": torch.tensor([[5, 2, 7]])},
        )
        inputs = {"input_ids": torch.tensor(ids[first:last]), "positions": positions}
        (wanted,) = interpret(program, inputs, program_weights(program), state)
        chunk = Chunk(ids[first:last].tolist(), first, [5, 2, 7])
        found = runner.run(make_step([chunk], num_groups=1, block_size=16)).logits
        # Queries meet codes, and weights their values, in bfloat16.
        assert error(found, wanted.numpy()) < 1e-2, first


def test_further_arrays_go_by_their_names() -> None:
    b = ProgramBuilder("p", phase="planned")
    b.symbol("T", 1, 64)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
    scale = b.input("scale", TensorType(DType.F32, (Sym("T"),)))
    x = b.emit("embedding", b.weight("table", TensorType(DType.F32, (VOCAB, 8))), ids)
    x = b.emit("mul", x, b.emit("reshape", scale, shape=("T", 1)))
    b.output(logits=x, more=x)
    program = with_weights(b.build(), random_weights(b.build(), seed=3))
    process = Interpreting()
    made = Runner(program, program_weights(program), process).made
    process.close()
    pointers = {
        (argument.space, argument.name)
        for launch in made.forms[0].launches
        for argument in launch.arguments
        if isinstance(argument, Pointer)
    }
    assert {("step", "input:scale"), ("output", "more")} < pointers
