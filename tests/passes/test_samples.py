"""Random weights: the same under the same name, and different in every row."""

from __future__ import annotations

import pytest
import torch

from infc.ir.builder import ProgramBuilder
from infc.ir.program import ModelSpec, Program
from infc.ir.types import DType, TensorType
from infc.passes.samples import BLOCK, SampleWeights


def program_of(*shape: int, dtype: DType = DType.F32) -> Program:
    builder = ProgramBuilder("some", ModelSpec("some", 1, 64, 1, 1, 64, 100, 100))
    for name in ("w", "v"):
        builder.weight(name, TensorType(dtype, shape))
    return builder.build()


def drawn(program: Program, name: str = "w") -> torch.Tensor:
    return SampleWeights((program,)).get(program, name)


@pytest.mark.parametrize("shape", [(7,), (5, 300), (3, 40, 60), (2500, 1000)])
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_a_name_gives_the_same_numbers_again(shape: tuple[int, ...], dtype: DType) -> None:
    program = program_of(*shape, dtype=dtype)
    first = drawn(program)
    assert first.shape == shape
    assert torch.equal(first, drawn(program))
    assert not torch.equal(first, drawn(program, "v"))
    width = 1 if len(shape) == 1 else shape[-1]
    spread = float((first.float() - (1 if len(shape) == 1 else 0)).square().mean() * width)
    assert 0.0 < spread < 1.2


@pytest.mark.parametrize("width", [64, 896, 1000])
def test_no_two_rows_are_the_same(width: int) -> None:
    """Also where a weight holds the numbers that are drawn more than once."""
    rows = 3 * BLOCK // width
    weight = drawn(program_of(rows, width))
    assert len(torch.unique(weight[:, :8], dim=0)) == rows
