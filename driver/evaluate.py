"""Perplexity and bits per byte of a text under an artifact, with every row's logits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..ir.errors import UsageError

if TYPE_CHECKING:
    from ..ir.artifact import Artifact
    from ..ir.manifest import Manifest
    from ..runtime.executors.base import Executor
    from ..runtime.step import Step


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How well a text was predicted. `nats` is the sum over the predicted tokens."""

    num_bytes: int
    num_tokens: int
    num_predicted: int
    nats: float
    context_tokens: int
    stride_tokens: int

    @property
    def perplexity(self) -> float:
        """Of the predicted tokens."""
        return math.exp(self.nats / self.num_predicted)

    @property
    def bits_per_byte(self) -> float:
        """Of the predicted tokens over the bytes of the whole text."""
        return self.nats / math.log(2) / self.num_bytes


def evaluate_text(
    artifact: Artifact,
    text: str,
    *,
    context_tokens: int | None = None,
    stride_tokens: int | None = None,
    num_threads: int | None = None,
) -> Evaluation:
    """Evaluates a text in windows of `context_tokens` that start `stride_tokens` apart.

    Each token counts once, in the first window that predicts it; the first of the text counts
    only where the model begins a text with a token of its own. Raises UsageError for a text of
    fewer than two tokens, or sizes that do not fit.
    """
    from ..runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(artifact)
    if tokenizer is None:
        raise UsageError("the artifact has no tokenizer", where=str(artifact.path))
    tokens = tokenizer.encode(text)
    limit = artifact.manifest.limits.max_context
    context = limit if context_tokens is None else context_tokens
    stride = max(1, context // 2) if stride_tokens is None else stride_tokens
    if not 2 <= context <= limit or not 1 <= stride < context:
        raise UsageError(
            f"a context of {context} and a stride of {stride} tokens do not fit",
            hint=f"context is 2..{limit}, and stride is less than context",
        )
    if len(tokens) < 2:
        raise UsageError(f"the text has {len(tokens)} tokens: nothing to predict")
    executor = _open(artifact, context, num_threads)
    try:
        nats = sum(
            _window_nats(executor, artifact.manifest, tokens[start:end], first - start)
            for start, first, end in _windows(len(tokens), context, stride)
        )
    finally:
        executor.close()
    num_bytes = len(text.encode())
    return Evaluation(num_bytes, len(tokens), len(tokens) - 1, nats, context, stride)


def _windows(count: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first token that counts, end) of each window; every token but 0 counts once."""
    start, first = 0, 1
    while first < count:
        end = min(start + context, count)
        yield start, first, end
        start, first = start + stride, end


def _open(artifact: Artifact, context: int, num_threads: int | None) -> Executor:
    from ..ir.machine import available_cpus
    from ..runtime.executors import open_executor
    from ..runtime.executors.base import ExecutorConfig

    artifact.verify_weights().result()
    groups = artifact.manifest.kv.groups
    # One sequence alone; block 0 is never used.
    blocks = tuple(-(-context // group.block_size) + 1 for group in groups)
    threads = num_threads or available_cpus()
    return open_executor(artifact, ExecutorConfig(num_blocks=blocks, num_threads=threads))


def _window_nats(
    executor: Executor, manifest: Manifest, tokens: Sequence[int], first: int
) -> float:
    """Sum of -log p over tokens[first:], each given all before it in the window."""
    import numpy as np

    rows = min(manifest.limits.step_tokens, manifest.limits.logit_rows)
    total = 0.0
    # The last token predicts nothing that counts.
    for start in range(0, len(tokens) - 1, rows):
        end = min(start + rows, len(tokens) - 1)
        wanted = range(max(start, first - 1), end)
        logits = executor.run(_step(manifest, tokens, start, end, wanted)).astype(np.float64)
        if not len(wanted):
            continue
        top = logits.max(axis=1)
        norm = np.log(np.exp(logits - top[:, None]).sum(axis=1)) + top
        targets = np.asarray(tokens[wanted.start + 1 : wanted.stop + 1])
        total += float((norm - logits[np.arange(len(wanted)), targets]).sum())
    return total


def _step(manifest: Manifest, tokens: Sequence[int], start: int, end: int, wanted: range) -> Step:
    """One sequence's chunk tokens[start:end], whose blocks are 1, 2, 3, ... in every group."""
    import numpy as np

    from ..runtime.step import Step

    def array(values: object) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
        return np.ascontiguousarray(values, dtype=np.int32)

    positions = array(np.arange(start, end))
    sizes = [group.block_size for group in manifest.kv.groups]
    return Step(
        token_ids=array(tokens[start:end]),
        positions=positions,
        query_starts=array([0, end - start]),
        context_lengths=array([end]),
        block_tables=tuple(array([np.arange(1, -(-end // size) + 1)]) for size in sizes),
        slots=tuple(array(positions + size) for size in sizes),
        block_copies=tuple(np.zeros((0, 2), np.int32) for _ in sizes),
        logits_index=array([at - start for at in wanted]),
    )
