"""Faults planted in mixtures of experts, sinks and latent attention, which must break parity."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from ..checkpoints import edit_config, make_checkpoint
from ..configs.base import VOCAB_SIZE
from .support import Eager, compile_checkpoint, prompts, relative_error, teacher_forced

Plant = Callable[[Path], None]
VISIBLE = 1e-3
"""Of the largest logit of a row; parity is held to a hundredth of it."""


def tensor(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Plant:
    """Changes every tensor whose name holds `part`."""

    def plant(checkpoint: Path) -> None:
        path = checkpoint / "model.safetensors"
        tensors = load_file(path)
        names = [name for name in tensors if part in name]
        assert names, "nothing was planted"
        for name in names:
            changed = change(tensors[name]).contiguous()
            assert not torch.equal(changed, tensors[name]), "nothing was planted"
            tensors[name] = changed
        save_file(tensors, path, metadata={"format": "pt"})

    return plant


def setting(key: str, value: Any) -> Plant:
    """Changes an entry of the configuration; `a.b` is one inside of another."""

    def plant(checkpoint: Path) -> None:
        first, _, inner = key.partition(".")
        old = json.loads((checkpoint / "config.json").read_text())[first]
        edit_config(checkpoint, **{first: {**old, inner: value} if inner else value})

    return plant


FAULTS: dict[str, tuple[str, Plant]] = {
    "dropped bias of gates": (
        "gpt_oss",
        tensor("layers.2.mlp.experts.gate_up_proj_bias", torch.zeros_like),
    ),
    "dropped bias behind experts": (
        "gpt_oss",
        tensor("layers.2.mlp.experts.down_proj_bias", torch.zeros_like),
    ),
    "dropped sinks": (
        "gpt_oss",
        tensor("layers.1.self_attn.sinks", lambda w: torch.full_like(w, -1e9)),
    ),
    "gates and ups swapped": (
        "gpt_oss",
        tensor(
            "layers.0.mlp.experts.gate_up_proj",
            lambda w: w.unflatten(-1, (-1, 2)).flip(-1).flatten(-2),
        ),
    ),
    "another limit": ("gpt_oss", setting("swiglu_limit", 0.9)),
    "dropped corrections": (
        "deepseek_v3",
        tensor("layers.3.mlp.gate.e_score_correction_bias", torch.zeros_like),
    ),
    "one group more": ("deepseek_v3", setting("topk_group", 3)),
    "other scale of scores": ("deepseek_v3", setting("rope_parameters.mscale_all_dim", 0.5)),
    "dropped shared expert": (
        "deepseek_v3",
        tensor("layers.2.mlp.shared_experts.down_proj", torch.zeros_like),
    ),
    "values of another head size": (
        "deepseek_v3",
        tensor(
            "layers.0.self_attn.kv_b_proj",
            lambda w: w.unflatten(0, (4, -1)).roll(1, 1).flatten(0, 1),
        ),
    ),
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], NDArray[np.float32]]:
    """What transformers makes of the prompt by architecture, with nothing planted."""

    @functools.cache
    def logits(arch: str) -> NDArray[np.float32]:
        checkpoint = make_checkpoint(arch, tmp_path_factory.mktemp(arch), seed=7)
        return Eager.load(checkpoint).logits(prompts(VOCAB_SIZE)[0])

    return logits


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_breaks_parity(
    name: str, expected: Callable[[str], NDArray[np.float32]], tmp_path: Path
) -> None:
    arch, plant = FAULTS[name]
    wrong = make_checkpoint(arch, tmp_path / "wrong", seed=7)
    plant(wrong)
    artifact = compile_checkpoint(wrong, tmp_path / "artifact", backend="reference")
    (actual,) = teacher_forced(artifact, prompts(VOCAB_SIZE)[:1])
    assert relative_error(actual, expected(arch)) > VISIBLE
