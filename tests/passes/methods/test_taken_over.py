"""What programs beside the model's step take over of what was calibrated for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infc.ir.program import Program, Value
from infc.ir.types import DType, TensorType
from infc.ir.weights import compute_expr
from infc.passes.base import PassContext
from infc.passes.methods.calibration import Calibration
from infc.passes.methods.scale_channels import ScaleChannels
from infc.passes.methods.spill import SpillFile

from ..test_cut_runs import stack
from .test_calibrate_weights import GPTQ, WINDOWS, parts_of, quantized
from .test_scale_channels import with_outliers

SCALE = ScaleChannels(scheme="int4", method="awq")


@pytest.fixture
def calibration(tmp_path: Path) -> Iterator[Calibration]:
    spill = SpillFile(tmp_path)
    yield Calibration(WINDOWS, spill)
    spill.close()


def context(calibration: Calibration, *, is_added: bool = False) -> PassContext:
    return PassContext(calibration=replace(calibration, is_added=is_added))


def of_another_checkpoint(program: Program) -> Program:
    """The same program, whose tensors have the same names and other values."""
    read = program.loaders["checkpoint"]

    def other(name: str) -> torch.Tensor:
        return read(name).flip(-1)

    return replace(program, loaders={**program.loaders, "checkpoint": other})


def test_codes_are_those_of_the_same_checkpoint(calibration: Calibration) -> None:
    model = quantized(program=stack((None, 4)))
    made = parts_of(GPTQ.run(model, context(calibration)).program)
    again = GPTQ.run(replace(model, name="added"), context(calibration, is_added=True))
    assert again.matches == len(made) // 2 > 0
    taken = parts_of(again.program)
    assert taken.keys() == made.keys()
    assert all(torch.equal(taken[name], made[name]) for name in made)
    other = of_another_checkpoint(model)
    result = GPTQ.run(other, context(calibration, is_added=True))
    assert (result.matches, result.program.weights) == (0, other.weights)
    assert len(result.near_misses) >= again.matches
    assert all("rounded to nearest" in str(one) for one in result.near_misses)


@pytest.mark.parametrize("is_step", [True, False])
def test_nothing_is_made_for_a_program_beside_the_model(
    is_step: bool, calibration: Calibration
) -> None:
    """Also where nothing of the model's step could be calibrated."""
    added = with_outliers(stack())
    if not is_step:
        further = Value("x", TensorType(DType.F32, (1,)))
        added = replace(added, inputs=(*added.inputs, further))
    for step, program in ((SCALE, added), (GPTQ, quantized(program=added))):
        result = step.run(program, context(calibration, is_added=True))
        assert (result.matches, result.program.weights) == (0, program.weights)
    assert not calibration.has_results


def test_scales_are_those_of_the_same_weights(calibration: Calibration) -> None:
    model = with_outliers(stack((None, 4)))
    scaled = SCALE.run(model, context(calibration))
    again = SCALE.run(replace(model, name="added"), context(calibration, is_added=True))
    assert again.matches == scaled.matches > 1
    assert again.program.weights == scaled.program.weights
    other = of_another_checkpoint(model)
    result = SCALE.run(other, context(calibration, is_added=True))
    assert (result.matches, result.program.weights) == (0, other.weights)
    norm = model.weights["layers.0.norm1"]
    half = replace(norm, expr=compute_expr("mul", (norm.expr, norm.expr), {}))
    changed = replace(model, weights={**model.weights, norm.name: half})
    result = SCALE.run(changed, context(calibration, is_added=True))
    assert result.matches == scaled.matches - 1
    assert result.program.weights[norm.name] == half
