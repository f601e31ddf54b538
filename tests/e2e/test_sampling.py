"""Whole answers: against transformers' own, and those of `cpp` against those of `reference`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from infc.ir.artifact import Artifact
from infc.runtime.api.llm import LLM
from infc.runtime.engine import Engine
from infc.runtime.options import RuntimeOptions
from infc.runtime.requests.outputs import RequestOutput, merge_outputs
from infc.runtime.sampling.sampling_params import SamplingParams

from ..checkpoints import make_checkpoint
from .support import Eager, compile_checkpoint, prompts, threads_for

NUM_TOKENS = 12
VOCAB = 320


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("sampling") / "checkpoint", seed=3)


@pytest.fixture(scope="module")
def both(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, Eager]:
    """A small model in infc and in transformers."""
    directory = tmp_path_factory.mktemp("artifact")
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
    batch = prompts(VOCAB, (33, 5))
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
    batch = prompts(VOCAB)
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


MIXED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "top_p": 0.9},
    "recommended": {
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "repetition_penalty": 1.1,
        "n": 2,
    },
    "repetition": {"repetition_penalty": 1.5, "logprobs": 2},
    "counts": {"frequency_penalty": 1.5, "presence_penalty": 0.5, "temperature": 0.8},
    "bias": {"logit_bias": {5: 6.0, 9: -20.0, 11: 4.0}, "repetition_penalty": 0.8},
    "allowed": {"allowed_token_ids": list(range(0, VOCAB, 7)), "temperature": 2.0},
    "banned": {"banned_token_ids": list(range(100)), "logprobs": 0},
    "must go on": {"min_tokens": 6, "stop_token_ids": list(range(0, VOCAB, 2))},
    "constraint": {"temperature": 1.0, "n": 2},
    "everything": {
        "temperature": 0.9,
        "top_k": 40,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": -0.2,
        "logit_bias": {3: 2.0, 30: 5.0},
        "allowed_token_ids": list(range(200)),
        "banned_token_ids": [30, 31],
        "min_tokens": 4,
        "stop_token_ids": [1, 2, 3],
        "prompt_logprobs": 1,
        "logprobs": 1,
    },
}
CONSTRAINED = ("constraint", "everything")


class Grammar:
    """A constraint: which tokens may come follows from all those before."""

    def mask(self, output_ids: Sequence[int]) -> NDArray[np.bool_]:
        allowed: NDArray[np.bool_] = np.random.default_rng([3, *output_ids]).random(VOCAB) < 0.2
        return allowed

    def rollback(self, num_tokens: int) -> None: ...

    def fork(self) -> Grammar:
        return self


def answers(artifact: Artifact, names: Sequence[str]) -> dict[str, RequestOutput]:
    """What these give together."""
    threads = threads_for(artifact.manifest.backend)
    engine = Engine.open(artifact, RuntimeOptions(kv_memory="8MiB", threads=threads))
    for index, (name, prompt) in enumerate(
        zip(MIXED, prompts(VOCAB, (33, 5, 20) * 4), strict=False)
    ):
        if name in names:
            params = SamplingParams(**{"max_tokens": NUM_TOKENS, "seed": index, **MIXED[name]})
            constraint = Grammar() if name in CONSTRAINED else None
            engine.add_request(name, prompt, params, constraint=constraint)
    parts: dict[str, list[RequestOutput]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            parts.setdefault(output.request_id, []).append(output)
    engine.close()
    return {name: merge_outputs(outputs) for name, outputs in parts.items()}


def test_all_parameters_in_one_batch(checkpoint: Path, tmp_path: Path) -> None:
    """The generated code gives what `reference` gives, and what each request gets alone."""
    cpp, reference = (
        compile_checkpoint(checkpoint, tmp_path / backend, backend=backend)
        for backend in ("cpp", "reference")
    )
    mixed, expected = answers(cpp, [*MIXED]), answers(reference, [*MIXED])
    assert mixed.keys() == MIXED.keys()
    for name, answer in mixed.items():
        assert answers(cpp, [name])[name].outputs == answer.outputs
        for ours, theirs in zip(answer.outputs, expected[name].outputs, strict=True):
            assert ours.token_ids == theirs.token_ids, name
            assert ours.finish_reason == theirs.finish_reason
            for one, other in zip(ours.logprobs or (), theirs.logprobs or (), strict=True):
                assert one.logprob == pytest.approx(other.logprob, abs=1e-3)
                assert [token for token, _ in one.top] == [token for token, _ in other.top]
