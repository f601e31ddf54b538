"""Layers that read another layer's cache: what transformers computes, in half of the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

import infc
from infc.driver.explain.collect import inspect_artifact
from infc.driver.explain.text import render_artifact
from infc.ir.artifact import Artifact
from infc.ir.errors import UsageError
from infc.runtime.limits import plan_runtime
from infc.runtime.options import RuntimeOptions

from .builds import PAIRS, Build, Builds
from .parity_table import BACKENDS, GREEDY_TOKENS
from .support import Eager, compile_checkpoint, parity_prompts, relative_error, teacher_forced
from .test_parity import BOUND

SHARED = "infc-test-shared"
FIRST = {0: 0, 1: 0, 2: 2, 3: 2}
"""By layer: the one whose keys and values it reads, of pairs of four layers."""
KEPT: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}


def shared_attention(
    module: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **kw: Any
) -> Any:
    """transformers' own attention; layers that share are given what the first of them made."""
    layer: Any = module.layer_idx
    if FIRST[layer] == layer:
        KEPT[layer] = k, v
    return eager_attention_forward(module, q, *KEPT[FIRST[layer]], mask, **kw)


@pytest.fixture
def eager_of() -> Any:
    """Gives transformers' model of a checkpoint, its layers in pairs."""
    ALL_ATTENTION_FUNCTIONS.register(SHARED, shared_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(SHARED, eager_mask)

    def load(checkpoint: Path) -> Eager:
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation=SHARED
        )
        return Eager(model.eval())

    return load


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen3"])
def test_layers_in_pairs_are_cross_layer_attention(
    arch: str, backend: str, builds: Builds, eager_of: Any
) -> None:
    build = Build(arch, backend, sets=PAIRS)
    artifact, eager = builds.artifact(build), eager_of(builds.checkpoint(build))
    sequences = parity_prompts(arch)
    for actual, sequence in zip(teacher_forced(artifact, sequences), sequences, strict=True):
        assert relative_error(actual, eager.logits(sequence)) < BOUND
    params = infc.SamplingParams(max_tokens=GREEDY_TOKENS, ignore_eos=True)
    shared = [*sequences, sequences[0][:48] + sequences[1][:5]]
    with infc.LLM(artifact, kv_memory="8MiB", threads=1) as llm:
        outputs = llm.generate(shared, params)
    for output, sequence in zip(outputs, shared, strict=True):
        assert eager.prefers(sequence, output.outputs[0].token_ids)


def kv_bytes(artifact: Artifact) -> int:
    return sum(group.bytes_per_block() for group in artifact.manifest.main.resources)


def test_sharing_takes_half_of_the_memory_of_keys_and_values(builds: Builds) -> None:
    whole, half = (builds.artifact(Build("llama", sets=sets)) for sets in ((), PAIRS))
    assert 2 * kv_bytes(half) == kv_bytes(whole)
    options = RuntimeOptions(kv_memory=20 * kv_bytes(whole), max_context=64)
    of_whole, of_half = (plan_runtime(one.manifest, options) for one in (whole, half))
    assert of_half.num_blocks[0] == 2 * of_whole.num_blocks[0]
    facts = inspect_artifact(half.path, memory=1 << 30)
    assert facts.memory.groups[0].layers == (0, 2)
    assert facts.program is not None
    assert facts.program.shape.sharing == (1, 3)
    text = render_artifact(facts, color=False)
    assert "2 of 4 layers read that of an earlier layer" in text
    dropped = facts.program.shape.num_parameters
    whole_facts = inspect_artifact(whole.path, memory=1 << 30).program
    assert whole_facts is not None
    # Two layers without projections of keys and values, [32, 64] each.
    assert whole_facts.shape.num_parameters - dropped == 2 * 2 * 32 * 64


def test_a_published_model_has_caches_for_its_first_layers_alone(builds: Builds) -> None:
    build = Build("gemma4_text")
    groups = [(one.reach, one.layers) for one in builds.artifact(build).manifest.main.resources]
    assert groups == [(8, (0, 2)), (None, (1,))]


def test_groups_by_name_and_what_is_no_group(builds: Builds, tmp_path: Path) -> None:
    checkpoint = builds.checkpoint(Build("mistral"))
    sets: dict[str, Any] = {"passes": {"share-kv": {"groups": "0+3"}}}
    artifact = compile_checkpoint(checkpoint, tmp_path / "a", backend="reference", **sets)
    assert artifact.manifest.main.resources[0].layers == (0, 1, 2)
    for groups, message in (
        ("0+9", "there is no layer 9"),
        ("0+1 1+2", "layer 1 is named twice"),
        ("0,1", "'0,1' is no group of layers"),
    ):
        sets = {"passes": {"share-kv": {"groups": groups}}}
        with pytest.raises(UsageError, match=message):
            compile_checkpoint(checkpoint, tmp_path / "b", backend="reference", **sets)
