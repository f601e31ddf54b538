"""How routed experts are captured: gates that are recognised, layouts, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from transformers import AutoConfig
from transformers.integrations import moe
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from infc.frontend.experts import Gate, experts_hook, read_gate
from infc.frontend.load import load_model
from infc.ir.errors import UnsupportedModelError
from infc.ir.types import DType, TensorType
from infc.ir.weights import evaluate_weight, infer_weight

from ..checkpoints import make_checkpoint
from .oracle import no_log


class Experts(torch.nn.Module):
    """As the library's decorator leaves an experts module."""

    _apply_gate = moe._default_apply_gate

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.zeros(4, 12, 8))
        self.down_proj = torch.nn.Parameter(torch.zeros(4, 8, 6))
        self.act_fn: Any = torch.nn.SiLU()
        self.has_gate, self.is_concatenated = True, True
        self.has_bias, self.is_transposed, self.has_post_expert_norm = False, False, False


def run_experts(experts: Experts) -> torch.Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True):
        index = torch.zeros(5, 2, dtype=torch.int64)
        return experts_hook(experts, torch.zeros(5, 8), index, torch.zeros(5, 2))


def test_experts_keep_the_shape() -> None:
    assert run_experts(Experts()).shape == (5, 8)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("has_gate", False, "no gate"),
        ("has_post_expert_norm", True, "norm after each expert"),
        ("act_fn", torch.nn.Hardtanh(), "activation"),
    ],
)
def test_experts_that_the_op_cannot_say(name: str, value: object, reason: str) -> None:
    experts = Experts()
    setattr(experts, name, value)
    with pytest.raises(UnsupportedModelError, match=reason):
        run_experts(experts)


class Limited(Experts):
    """Cuts its gate and up, as some models do."""

    def __init__(self, limit: float, shift: float) -> None:
        super().__init__()
        self.swiglu_limit, self.shift = limit, shift

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        limit = self.swiglu_limit
        return F.silu(gate.clamp(max=limit)) * (up.clamp(-limit, limit) + self.shift)


@given(st.floats(0.5, 20), st.sampled_from([0.0, 1.0]))
def test_a_limited_gate_is_read(limit: float, shift: float) -> None:
    experts = Limited(limit, shift)
    assert read_gate(experts) == Gate("silu", 1.0, limit, shift)
    with FakeTensorMode():
        assert read_gate(experts) == Gate("silu", 1.0, limit, shift), "asked while tracing"


@given(st.floats(0.5, 20), st.floats(1.1, 3))
def test_the_gate_of_gpt_oss_is_read(limit: float, alpha: float) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_local_experts": 2}
    config = AutoConfig.for_model("gpt_oss", **sizes)
    config.swiglu_limit, config.swiglu_alpha = limit, alpha
    assert read_gate(GptOssExperts(config)) == Gate("silu", alpha, limit, 1.0)


def test_a_gate_that_differs_beyond_its_limit_is_refused() -> None:
    class OneSided(Limited):
        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            gate, up = gate_up.chunk(2, -1)
            return F.silu(gate.clamp(max=self.swiglu_limit)) * up.clamp(max=self.swiglu_limit)

    with pytest.raises(UnsupportedModelError, match="a custom gate"):
        run_experts(OneSided(7.0, 0.0))


def test_a_correction_keeps_its_precision(tmp_path: Path) -> None:
    """Rounded to bfloat16 it would choose other experts than the library does."""
    make_checkpoint("glm4_moe", tmp_path, dtype="bfloat16", num_hidden_layers=2)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[name] = torch.rand(8) + 1 / 3
    save_file(tensors, path, metadata={"format": "pt"})
    program = load_model(tmp_path, log=no_log)
    router = program.weights["model.layers.1.mlp.gate.weight"]
    assert infer_weight(router.expr.inputs[0]) == TensorType(DType.BF16, (8, 64))
    assert torch.equal(evaluate_weight(program, name), tensors[name])


def test_a_gate_of_another_form_is_refused() -> None:
    class Gated(Experts):
        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            return gate_up

    with pytest.raises(UnsupportedModelError, match="a custom gate"):
        run_experts(Gated())
