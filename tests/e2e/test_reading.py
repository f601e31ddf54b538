"""Embeddings and scores of compiled models: transformers' numbers, the same bits in any company."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import infc
from infc.runtime.engine import Engine
from infc.runtime.requests.pooling import Pooling

from .builds import Build, Builds
from .support import Eager, prompts, relative_error

LENGTHS = (70, 33, 5, 101, 17)
BOUND = 1e-5
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


def embedded_beside_a_stream(
    engine: Engine, prompt: list[int], other: list[int], pooling: Pooling
) -> NDArray[np.float32]:
    """The embedding of a prompt in steps that give logits too."""
    engine.add_request("other", other, infc.SamplingParams(max_tokens=20, ignore_eos=True))
    engine.step()
    engine.read_prompt("read", prompt, pooling=pooling)
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    (found,) = (output.embedding for output in outputs if output.request_id == "read")
    assert found is not None
    return found


def log_softmax(logits: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float64]:
    """Log-probabilities of the tokens that follow."""
    rows = torch.from_numpy(logits[: len(tokens)]).double().log_softmax(-1).numpy()
    picked: NDArray[np.float64] = rows[np.arange(len(tokens)), list(tokens)]
    return picked


@pytest.mark.parametrize("arch", ["llama-tied", "gemma2", "gpt2", "mixtral"])
def test_embeddings_and_scores_are_those_of_transformers_alone_and_together(
    arch: str, builds: Builds
) -> None:
    build = Build(arch)
    artifact, eager = builds.artifact(build), Eager.load(builds.checkpoint(build))
    sequences = prompts(artifact.manifest.model.vocab_size, LENGTHS)
    with infc.LLM(artifact, kv_memory="4MiB", step_tokens=24, threads=2) as llm:
        together = {
            pooling: llm.embed(sequences, pooling=pooling, normalize=False) for pooling in POOLINGS
        }
        scores = llm.score(sequences)
        for pooling, vectors in together.items():
            found = embedded_beside_a_stream(llm.engine, sequences[0], sequences[1], pooling)
            assert np.array_equal(found, vectors[0].values)
    for index, sequence in enumerate(sequences):
        logits, hidden = eager.rows(sequence)
        pooled = {"last": hidden[-1:], "mean": hidden.mean(0, dtype=np.float64, keepdims=True)}
        for pooling in POOLINGS:
            found = together[pooling][index].values[None]
            assert relative_error(found, pooled[pooling]) < BOUND
        wanted = log_softmax(logits, sequence[1:])
        assert (
            np.abs(np.array(scores[index].logprobs) - wanted).max() < BOUND * np.abs(logits).max()
        )
    for index, sequence in enumerate(sequences):
        with infc.LLM(artifact, kv_memory="4MiB", threads=1, prefix_reuse=False) as alone:
            assert alone.score([sequence]) == [scores[index]]
            for pooling in POOLINGS:
                (vector,) = alone.embed([sequence], pooling=pooling, normalize=False)
                assert np.array_equal(vector.values, together[pooling][index].values)
