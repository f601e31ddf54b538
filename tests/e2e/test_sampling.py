"""Whole answers against transformers' own: penalties, masks, log-probabilities of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from infc.runtime.api.llm import LLM
from infc.runtime.sampling.sampling_params import SamplingParams

from ..checkpoints import make_checkpoint
from .support import Eager, compile_checkpoint, prompts

NUM_TOKENS = 12


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, Eager]:
    """A small model in infc and in transformers."""
    directory: Path = tmp_path_factory.mktemp("sampling")
    checkpoint = make_checkpoint("llama", directory / "checkpoint", seed=3)
    artifact = compile_checkpoint(checkpoint, directory / "artifact")
    return LLM(artifact, kv_memory="8MiB"), Eager.load(checkpoint)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        (
            {"repetition_penalty": 1.2, "banned_token_ids": [5, 9], "logit_bias": {7: 3.0}},
            {"repetition_penalty": 1.2, "suppress_tokens": [5, 9], "sequence_bias": [[[7], 3.0]]},
        ),
    ],
)
def test_greedy_answers(
    both: tuple[LLM, Eager], ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    llm, eager = both
    batch = prompts(320, (33, 5))
    params = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, **ours)
    answers = llm.generate(batch, params)
    plain = llm.generate(batch, SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True))
    assert [a.outputs for a in answers] != [p.outputs for p in plain]
    for prompt, answer in zip(batch, answers, strict=True):
        with torch.inference_mode():
            tokens = eager.model.generate(  # type: ignore[operator]
                torch.tensor([prompt]),
                max_new_tokens=NUM_TOKENS,
                min_new_tokens=NUM_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **theirs,
            )[0]
        assert list(answer.outputs[0].token_ids) == tokens[len(prompt) :].tolist()


def test_logprobs_of_prompts(both: tuple[LLM, Eager]) -> None:
    llm, eager = both
    batch = prompts(320)
    params = SamplingParams(max_tokens=0, prompt_logprobs=4)
    for prompt, answer in zip(batch, llm.generate(batch, params), strict=True):
        expected = torch.log_softmax(torch.from_numpy(eager.logits(prompt)).double(), -1)
        assert answer.prompt_logprobs is not None
        first, *entries = answer.prompt_logprobs
        assert first is None and len(entries) == len(prompt) - 1
        for row, token, entry in zip(expected, prompt[1:], entries, strict=False):
            assert entry is not None and entry.token_id == token
            assert entry.logprob == pytest.approx(float(row[token]), abs=1e-3)
            assert [i for i, _ in entry.top] == row.topk(4).indices.tolist()
            assert entry.rank == 1 + int((row > row[token]).sum())
