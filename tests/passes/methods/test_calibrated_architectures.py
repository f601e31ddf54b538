"""Calibrated methods on captured models: which channels are scaled, experts, whole pipelines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from infc.frontend.load import load_model
from infc.ir.interpret import Interpreter
from infc.ir.program import Program
from infc.ir.weights import evaluate_weight
from infc.passes.base import PassContext, PassResult
from infc.passes.methods import scale_channels
from infc.passes.methods.calibration import Calibration
from infc.passes.methods.channel_scales import Choice, _powers_of_two
from infc.passes.methods.scale_channels import ScaleChannels
from infc.passes.methods.spill import SpillFile
from infc.passes.pass_manager import run_pipeline
from infc.passes.pipeline import STAGES, Pipeline, build_pipeline

from ...checkpoints import make_checkpoint

LAYERS = 2
WINDOWS = tuple(
    tuple(torch.randint(1, 200, (60,), generator=torch.Generator().manual_seed(n)).tolist())
    for n in range(4)
)


def captured(arch: str, directory: Path) -> Program:
    """A small checkpoint before anything is quantised."""
    make_checkpoint(arch, directory / arch, seed=1, num_hidden_layers=LAYERS)
    return load_model(directory / arch, dtype="bfloat16", max_context=64, log=lambda line: None)


def canonical(arch: str, directory: Path) -> Program:
    program = captured(arch, directory)
    return run_pipeline(program, Pipeline(STAGES["canonicalize"]), verify=False)[0]


@pytest.fixture
def spill(tmp_path: Path) -> Iterator[SpillFile]:
    made = SpillFile(tmp_path)
    yield made
    made.close()


def scaled(program: Program, spill: SpillFile, method: str) -> PassResult:
    context = PassContext(calibration=Calibration(WINDOWS, spill))
    return ScaleChannels(method=method, scheme="int4").run(program, context)


def logits(program: Program) -> torch.Tensor:
    places = torch.arange(60)
    given = {"input_ids": torch.tensor(WINDOWS[0]), "positions": places, "logits_index": places}
    run = Interpreter(program, lambda name: evaluate_weight(program, name), dtype_override="f32")
    return run.run({value.name: given[value.name] for value in program.inputs})[0]


@pytest.mark.parametrize(
    ("arch", "groups"),
    [("llama", 4), ("gemma2", 4), ("phi3", 4), ("gpt2", 3), ("mixtral", 3), ("qwen2_moe", 4)],
)
def test_groups_of_channels_are_found_and_scaling_them_changes_no_bit(
    arch: str, groups: int, tmp_path: Path, spill: SpillFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of merged projections, experts with their router, norms of 1 + w; `groups` of a layer."""

    def spread(*of: object) -> Choice:
        classes = of[2]
        assert isinstance(classes, torch.Tensor)
        logs = 4 * torch.randn(len(classes), generator=torch.Generator().manual_seed(7))
        return Choice(_powers_of_two(logs, classes), 0.5, 1.0, 0.5)

    monkeypatch.setattr(scale_channels, "choose_scales", spread)
    before = canonical(arch, tmp_path)
    result = scaled(before, spill, "smoothquant")
    assert result.matches == groups * LAYERS
    assert torch.equal(logits(before), logits(result.program))


@pytest.mark.parametrize(("arch", "mixtures"), [("mixtral", 2), ("qwen2_moe", 1)])
def test_mixtures_are_scaled_and_calibrated(
    arch: str, mixtures: int, tmp_path: Path, spill: SpillFile
) -> None:
    """The whole pipeline; experts that few tokens reach are counted.

    It is not verified: experts of 64 columns lose more by rounding than schemes are allowed to.
    """
    spec = {
        "scale-channels": {"scheme": "int4", "method": "awq"},
        "quantize-weights": {"scheme": "int4", "head": "int8"},
        "calibrate-weights": {"method": "gptq"},
    }
    context = PassContext(calibration=Calibration(WINDOWS, spill))
    _, report = run_pipeline(
        captured(arch, tmp_path),
        build_pipeline(spec),
        context,
        verify=False,
        failure_directory=tmp_path,
    )
    data = {one["name"]: one for one in report.as_data()["passes"]}["calibrate-weights"]
    records = [one for one in data["details"]["errors"] if "experts" in one]
    assert len(records) == 2 * mixtures
    assert all(one["gptq"] <= one["nearest"] for one in records)
    counted = {f"@{one['matrix']}.codes" for one in records if one["nearest_experts"]}
    named = {miss["where"] for miss in data["near_misses"] if "experts are" in miss["reason"]}
    assert counted == named
