"""Captured programs give transformers' logits, and planted faults do not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from infc.frontend.load import load_model
from infc.ir.errors import CheckpointError
from infc.ir.program import Node, Program
from infc.ir.types import DType
from infc.ir.verify import verify
from infc.ir.weights import evaluate_weight

from ..checkpoints import edit_config, make_checkpoint
from ..configs import CONFIGS
from ..configs.base import WINDOW
from .oracle import captured_logits, eager_logits, no_log, parity_error, prompt, relative_error

TOLERANCE = 1e-5
VISIBLE = 1e-3
WIDE = {DType.F32, DType.I64, DType.I32, DType.BOOL}


def load(directory: Path, **options: Any) -> Program:
    defaults: dict[str, Any] = {"step_tokens": 64, "logit_rows": 16, "log": no_log}
    return load_model(directory, **{**defaults, **options})


Captured = Callable[[str], tuple[Path, Program]]


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Captured:
    """A checkpoint and its program by name, made once."""

    @functools.cache
    def make(arch: str) -> tuple[Path, Program]:
        directory = make_checkpoint(arch, tmp_path_factory.mktemp(arch))
        return directory, load(directory, max_context=CONFIGS[arch].max_context)

    return make


CAPTURED = (
    "llama",
    "llama-yarn",
    "qwen2",
    "mistral",
    "gemma2",
    "gpt2",
    "phi3-longrope",
    "mixtral",
    "falcon",
    "apertus",
    "stablelm-parallel",
    "deepseek_v2",
)
"""One of each kind of graph; all of them are compared whole, compiled, in tests/e2e."""


@pytest.mark.parametrize("arch", CAPTURED)
def test_logits_are_those_of_transformers(arch: str, captured: Captured) -> None:
    directory, program = captured(arch)
    verify(program)
    assert program.phase == "captured"
    assert parity_error(directory, program) < TOLERANCE


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "mixtral"])
def test_a_bfloat16_model_computes_in_float32(arch: str, tmp_path: Path) -> None:
    make_checkpoint(arch, tmp_path, dtype="bfloat16")
    program = load(tmp_path)
    assert program.spec.dtype == "bf16"
    assert {value.type.dtype for node in program.nodes for value in node.outputs} <= WIDE
    ids = prompt()
    got = captured_logits(program, ids, (0, 20, 39))
    assert relative_error(got, eager_logits(tmp_path, ids)[[0, 20, 39]]) < TOLERANCE


def test_one_token_alone(captured: Captured) -> None:
    """Export assumes at least two tokens; the program must not."""
    directory, program = captured("llama")
    assert parity_error(directory, program, prompt(tokens=1)) < TOLERANCE


@pytest.mark.parametrize("max_context", [16, 128])
def test_longrope_takes_the_side_of_max_context(max_context: int, tmp_path: Path) -> None:
    make_checkpoint("phi3-longrope", tmp_path)
    lines: list[str] = []
    program = load(tmp_path, max_context=max_context, log=lines.append)
    assert parity_error(tmp_path, program, prompt(tokens=min(max_context, 40))) < TOLERANCE
    assert any("longrope" in line and str(max_context) in line for line in lines)


def test_dynamic_rope_is_constant_within_the_model_length(tmp_path: Path) -> None:
    make_checkpoint("llama-dynamic", tmp_path)
    assert parity_error(tmp_path, load(tmp_path)) < TOLERANCE


@pytest.mark.parametrize("max_context", [129, 200])
def test_dynamic_rope_is_that_of_max_context_beyond_it(max_context: int, tmp_path: Path) -> None:
    """transformers takes the base of the sequence it is given: they agree at that length."""
    make_checkpoint("llama-dynamic", tmp_path)
    lines: list[str] = []
    program = load(tmp_path, max_context=max_context, step_tokens=256, log=lines.append)
    assert program.spec.max_context == max_context
    assert parity_error(tmp_path, program, prompt(tokens=max_context)) < TOLERANCE
    assert any("dynamic" in line and str(max_context) in line for line in lines)
    plain = load(tmp_path, step_tokens=256)
    assert parity_error(tmp_path, plain, prompt(tokens=max_context)) > 100 * TOLERANCE


def test_layers_with_scales_of_their_own(tmp_path: Path) -> None:
    """Equal shapes, unequal constants: such layers are not clones of each other."""
    make_checkpoint("gpt2", tmp_path, scale_attn_by_inverse_layer_idx=True)
    program = load(tmp_path)
    scales = [node.attrs["scale"] for node in program.nodes if node.op == "attention"]
    assert len(set(scales)) == len(scales) == 4
    assert parity_error(tmp_path, program) < TOLERANCE


def test_window_of_some_layers(captured: Captured) -> None:
    assert captured("gemma2")[1].spec.windows == (WINDOW, None, WINDOW, None)


def weights_changed(
    program: Program, change: Callable[[str, torch.Tensor], torch.Tensor]
) -> Program:
    """The program with each checkpoint tensor (and constant) changed as it is read."""

    def wrap(loader: Callable[[str], torch.Tensor]) -> Callable[[str], torch.Tensor]:
        return lambda name: change(name, loader(name))

    loaders = {kind: wrap(loader) for kind, loader in program.loaders.items()}
    return replace(program, loaders=loaders)


def nodes_changed(program: Program, change: Callable[[Node], Node]) -> Program:
    return program.with_nodes(tuple(change(node) for node in program.nodes))


def _negate_keys(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return -tensor if "k_proj" in name else tensor


def _halve_frequencies(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor / 2 if "inv_freq" in name else tensor


def _drop_biases(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if name.endswith("bias") else tensor


def _flatten_norm(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(tensor) if "layers.1.input_layernorm" in name else tensor


def _widen_window(node: Node) -> Node:
    if node.op != "attention":
        return node
    return replace(node, attrs={**node.attrs, "window": WINDOW + 1})


FAULTS: dict[str, tuple[str, Callable[[Program], Program]]] = {
    "sign of K": ("llama", lambda p: weights_changed(p, _negate_keys)),
    "rope": ("llama", lambda p: weights_changed(p, _halve_frequencies)),
    "window + 1": ("mistral", lambda p: nodes_changed(p, _widen_window)),
    "dropped bias": ("qwen2", lambda p: weights_changed(p, _drop_biases)),
    "norm weight": ("llama", lambda p: weights_changed(p, _flatten_norm)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_shows(fault: str, captured: Captured) -> None:
    """The same comparison that passes for the program as it is."""
    arch, plant = FAULTS[fault]
    directory, program = captured(arch)
    assert parity_error(directory, plant(program)) > VISIBLE


def test_float16_is_widened_and_said(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path, dtype="float16")
    lines: list[str] = []
    program = load(tmp_path, log=lines.append)
    assert program.outputs[0].type.dtype.value == "f32"
    assert any("f16" in line for line in lines)
    assert parity_error(tmp_path, program) < TOLERANCE


def test_weights_beyond_float16_are_named(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name][0, 0] = 7e4
    save_file(tensors, path, {"format": "pt"})
    program = load(tmp_path, dtype="float16")
    reader = next(one for one in program.weights.values() if "layers.0.mlp.down_proj" in one.name)
    with pytest.raises(
        CheckpointError, match=r"down_proj.*up to 7e\+04, and float16 ends at 65504"
    ):
        evaluate_weight(program, reader)


def test_rounding_to_bfloat16_is_said(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    lines: list[str] = []
    program = load(tmp_path, dtype="bfloat16", log=lines.append)
    assert program.spec.dtype == "bf16"
    assert any("bfloat16" in line for line in lines)
    matrix, vector = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    exact = load_file(tmp_path / "model.safetensors")
    assert torch.equal(evaluate_weight(program, matrix), exact[matrix].bfloat16().float())
    assert torch.equal(evaluate_weight(program, vector), exact[vector])


def test_head_size_of_its_own(tmp_path: Path) -> None:
    """Older configurations do not say head_dim; newer ones say another than hidden / heads."""
    make_checkpoint("llama", tmp_path, head_dim=32)
    program = load(tmp_path)
    assert program.spec.head_dim == 32
    assert parity_error(tmp_path, program) < TOLERANCE
    edit_config(tmp_path, head_dim=8)
    with pytest.raises(CheckpointError, match=r"self_attn.*config\.json needs shape"):
        load(tmp_path)
