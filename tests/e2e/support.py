"""Compiles small checkpoints, and asks both infc and transformers for logits and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

import infc
from infc.ir.artifact import Artifact
from infc.runtime.executors import open_executor
from infc.runtime.executors.base import ExecutorConfig, run_step

from ..codegen.harness import Chunk, make_step
from ..configs import CONFIGS
from ..configs.base import VOCAB_SIZE

BLOCK_SIZE = 16
PROMPT_LENGTHS = (70, 33, 5, 101)
"""Longer than windows (8), blocks (16), chunks and original rope lengths (16)."""


def prompts(vocab_size: int, lengths: Sequence[int] = PROMPT_LENGTHS) -> list[list[int]]:
    """Random token ids, one prompt a length, without the special ones at the vocabulary's end."""
    rng = np.random.default_rng(11)
    return [[int(t) for t in rng.integers(0, vocab_size - 64, n)] for n in lengths]


def parity_prompts(arch: str) -> list[list[int]]:
    """Prompts that transformers and infc choose the same rope for, with room to answer."""
    return prompts(VOCAB_SIZE, (70, 33, max(5, CONFIGS[arch].min_tokens), 95))


def compile_checkpoint(
    checkpoint: Path, output: Path, *, backend: str = "cpp", dtype: str = "float32", **sets: object
) -> Artifact:
    """The artifact of a checkpoint directory, without the cache."""
    overrides = [
        f"dtype={dtype}",
        f"backend={backend}",
        f"kv_cache.block_size={BLOCK_SIZE}",
        "runtime.step_tokens=256",
        "runtime.logit_rows=256",
        *(f"{key}={value}" for key, value in sets.items()),
    ]
    # What verification would catch, the comparisons of these tests do.
    return infc.compile(checkpoint, output=output, overrides=overrides, verify=False, cache=False)


def teacher_forced(
    artifact: Artifact, sequences: Sequence[Sequence[int]], *, chunk: int = 23
) -> list[NDArray[np.float32]]:
    """Logits after every token of every sequence, fed together in chunks of uneven sizes."""
    return forced_rows(artifact, sequences, chunk=chunk)[0]


def threads_for(backend: str) -> int:
    """Two where threads are ours. Torch's spin at their barriers where tests share the cores."""
    return 2 if backend == "cpp" else 1


def forced_rows(
    artifact: Artifact, sequences: Sequence[Sequence[int]], *, chunk: int = 23
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
    """As `teacher_forced`; beside the logits the hidden states that enter the head."""
    groups = artifact.manifest.main.resources
    block_size = groups[0].block_size
    blocks_each = -(-max(map(len, sequences)) // block_size)
    total = 1 + blocks_each * len(sequences)
    executor = open_executor(
        artifact,
        ExecutorConfig(
            num_blocks=(total,) * len(groups), num_threads=threads_for(artifact.manifest.backend)
        ),
    )
    # Blocks are handed out in no order, so that a wrong table cannot be right by chance.
    ids = np.random.default_rng(2).permutation(np.arange(1, total)).reshape(len(sequences), -1)
    rows: list[list[NDArray[np.float32]]] = [[] for _ in sequences]
    states: list[list[NDArray[np.float32]]] = [[] for _ in sequences]
    width = artifact.manifest.main.hidden_width
    done = [0] * len(sequences)
    try:
        while any(d < len(s) for d, s in zip(done, sequences, strict=True)):
            turn = [
                (i, Chunk(s[d : d + chunk + 3 * i], d, [int(b) for b in ids[i]]))
                for i, (d, s) in enumerate(zip(done, sequences, strict=True))
                if d < len(s)
            ]
            step = make_step(
                [part for _, part in turn], num_groups=len(groups), block_size=block_size
            )
            output = run_step(executor, replace(step, wants_hidden=width is not None))
            hidden = np.zeros((step.num_tokens, 0), np.float32)
            hidden = hidden if output.hidden is None else output.hidden
            for place, (i, part) in enumerate(turn):
                first, last = step.query_starts[place : place + 2]
                rows[i].append(output.logits[first:last])
                states[i].append(hidden[first:last])
                done[i] += len(part.ids)
    finally:
        executor.close()
    return [np.concatenate(parts) for parts in rows], [np.concatenate(parts) for parts in states]


@dataclass(frozen=True, slots=True)
class Eager:
    """transformers' own model of a checkpoint."""

    model: torch.nn.Module

    @classmethod
    def load(cls, checkpoint: Path, dtype: torch.dtype = torch.float32) -> Eager:
        """Eager attention, in evaluation mode."""
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation="eager"
        )
        return cls(model.eval())

    def logits(self, sequence: Sequence[int]) -> NDArray[np.float32]:
        """Logits after every token."""
        return self.rows(sequence)[0]

    @torch.inference_mode()
    def rows(self, sequence: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits and the last hidden states, those behind the last norm, after every token."""
        output = self.model(torch.tensor([list(sequence)]), output_hidden_states=True)
        return output.logits[0].float().numpy(), output.hidden_states[-1][0].float().numpy()

    def prefers(self, sequence: Sequence[int], tokens: Sequence[int]) -> bool:
        """Whether greedy decoding after `sequence` gives exactly `tokens`.

        Each token must be the likeliest after those before it (the lowest id of equals), which
        one pass over all of them tells.
        """
        logits = self.logits([*sequence, *tokens[:-1]])
        return bool(np.array_equal(logits[len(sequence) - 1 :].argmax(-1), tokens))


def relative_error(actual: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The largest difference, relative to the largest logit of its row; worst row."""
    error = np.abs(actual - expected).max(-1) / np.abs(expected).max(-1)
    return float(error.max())
