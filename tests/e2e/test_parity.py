"""Parity with transformers, and the planted faults that must break it."""

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

import infc

from ..checkpoints import edit_config, make_checkpoint
from ..configs import CONFIGS
from .builds import Build, Builds
from .parity_table import BACKENDS, GREEDY_TOKENS, record
from .support import (
    Eager,
    compile_checkpoint,
    forced_rows,
    parity_prompts,
    prompts,
    relative_error,
    teacher_forced,
    threads_for,
)

BOUND = 1e-5
"""Of the largest logit of a row, in float32."""
BF16_BOUND = 0.015
"""Root mean square, relative to that of the logits."""


Rows = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Logits, and the hidden states that enter the head."""


@functools.lru_cache(maxsize=1)
def expected(checkpoint: Path, arch: str) -> tuple[Eager, list[Rows]]:
    """transformers' model of an architecture, and what it makes of the prompts."""
    eager = Eager.load(checkpoint)
    return eager, [eager.rows(sequence) for sequence in parity_prompts(arch)]


# Backends vary fastest: what both are compared with is then computed once.
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("arch", CONFIGS)
def test_logits_hidden_states_and_greedy_tokens_are_those_of_transformers(
    arch: str, backend: str, builds: Builds, update_golden: bool
) -> None:
    build = Build(arch, backend)
    artifact = builds.artifact(build)
    sequences = parity_prompts(arch)
    forced = forced_rows(artifact, sequences)
    eager, theirs = expected(builds.checkpoint(build), arch)
    errors = [
        tuple(map(relative_error, ours, rows)) for *ours, rows in zip(*forced, theirs, strict=True)
    ]
    of_logits, of_hidden = map(max, zip(*errors, strict=True))
    assert of_logits < BOUND and of_hidden < BOUND
    params = infc.SamplingParams(max_tokens=GREEDY_TOKENS, ignore_eos=True)
    with infc.LLM(artifact, kv_memory="8MiB", threads=threads_for(backend)) as llm:
        outputs = llm.generate(sequences, params)
    for output, sequence in zip(outputs, sequences, strict=True):
        tokens = output.outputs[0].token_ids
        assert len(tokens) == GREEDY_TOKENS and eager.prefers(sequence, tokens)
    record(arch, backend, of_logits, bound=BOUND, update=update_golden)


def test_bfloat16_rounds_rows_of_products_and_the_cache_alone(builds: Builds) -> None:
    """Where every value is rounded, the error is 0.02 instead of 0.011."""
    build = Build("llama", dtype="bfloat16")
    sequences = parity_prompts(build.arch)
    ours, _ = forced_rows(builds.artifact(build), sequences)
    eager = Eager.load(builds.checkpoint(build))
    squares = [
        ((mine - theirs) ** 2).mean() / (theirs**2).mean()
        for mine, theirs in zip(ours, map(eager.logits, sequences), strict=True)
    ]
    assert np.sqrt(np.mean(squares)) < BF16_BOUND


@pytest.mark.parametrize(
    ("arch", "window"),
    [("llama", None), ("mistral", 300), ("gemma2", 300), ("gemma4_text", 300)],
    ids=lambda v: str(v),
)
def test_prompts_longer_than_a_chunk_of_attention(
    arch: str, window: int | None, tmp_path: Path
) -> None:
    """The kernel attends in chunks of 256 positions; windows begin inside of one."""
    changes: dict[str, Any] = {} if window is None else {"sliding_window": window}
    checkpoint = make_checkpoint(
        arch, tmp_path / "checkpoint", seed=9, max_position_embeddings=1024, **changes
    )
    artifact = compile_checkpoint(checkpoint, tmp_path / "artifact")
    eager = Eager.load(checkpoint)
    sequences = prompts(artifact.manifest.model.vocab_size, (700, 257, 530))
    answers = teacher_forced(artifact, sequences, chunk=75)
    for actual, sequence in zip(answers, sequences, strict=True):
        assert relative_error(actual, eager.logits(sequence)) < BOUND


BFLOAT16_BOUND = 0.05
"""Of the largest logit: bfloat16 keeps eight bits, and both sides round at every op."""


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma2", "mixtral", "gpt2", "gpt_oss"])
def test_bfloat16_stays_within_its_bound(arch: str, builds: Builds) -> None:
    build = Build(arch, dtype="bfloat16")
    checkpoint, artifact = builds.checkpoint(build), builds.artifact(build)
    eager = Eager.load(checkpoint, torch.float32)
    sequences = prompts(artifact.manifest.model.vocab_size)
    rounded = Eager.load(checkpoint, torch.bfloat16)
    actual = np.concatenate(teacher_forced(artifact, sequences))
    expected, theirs = (
        np.concatenate([one.logits(sequence) for sequence in sequences]) for one in (eager, rounded)
    )
    # As good as transformers' own bfloat16, whose rounding is of the same kind. Over all prompts:
    # in a short one, a token that rounding sends to another expert decides alone.
    error = _mean_error(actual, expected)
    assert error < 1.3 * _mean_error(theirs, expected) + 1e-3
    assert error < BFLOAT16_BOUND


def _mean_error(actual: Any, expected: Any) -> float:
    return float(abs(actual - expected).mean() / abs(expected).max())


def flip_k(checkpoint: Path) -> None:
    """Every key projection with its sign turned."""
    _edit(checkpoint, lambda name, w: -w if "k_proj.weight" in name else w)


def scale_rope(checkpoint: Path) -> None:
    """Half the rope frequency at the slow end."""
    config = json.loads((checkpoint / "config.json").read_text())
    rope = {**config["rope_parameters"], "rope_theta": 20000.0}
    edit_config(checkpoint, rope_parameters=rope)


def widen_window(checkpoint: Path) -> None:
    """A window of one token more."""
    config = json.loads((checkpoint / "config.json").read_text())
    edit_config(checkpoint, sliding_window=config["sliding_window"] + 1)


def drop_bias(checkpoint: Path) -> None:
    """The value bias of one layer left out."""
    _edit(checkpoint, lambda name, w: w * 0 if "layers.2.self_attn.v_proj.bias" in name else w)


def dull_norm(checkpoint: Path) -> None:
    """The weight of one norm left out."""
    _edit(checkpoint, lambda name, w: w * 0 + 1 if "layers.1.input_layernorm" in name else w)


def _edit(checkpoint: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    path = checkpoint / "model.safetensors"
    before = load_file(path)
    after = {name: change(name, w) for name, w in before.items()}
    assert any(not torch.equal(before[name], after[name]) for name in before), "nothing was planted"
    save_file(after, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("arch", "plant"),
    [
        ("llama-tied", flip_k),
        ("llama", scale_rope),
        ("mistral", widen_window),
        ("qwen2", drop_bias),
        ("llama-tied", dull_norm),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_planted_fault_breaks_parity(
    arch: str, plant: Callable[[Path], None], tmp_path: Path
) -> None:
    eager = Eager.load(make_checkpoint(arch, tmp_path / "right", seed=7))
    wrong = make_checkpoint(arch, tmp_path / "wrong", seed=7)
    plant(wrong)
    artifact = compile_checkpoint(wrong, tmp_path / "artifact", backend="reference")
    sequence = prompts(artifact.manifest.model.vocab_size)[0]
    (actual,) = teacher_forced(artifact, [sequence])
    assert relative_error(actual, eager.logits(sequence)) > 100 * BOUND
