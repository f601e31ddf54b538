"""Evaluates an artifact on a text: perplexity, and the divergence from another artifact."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..ir.errors import UsageError
from .bare_executor import open_bare

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..ir.artifact import Artifact
    from ..ir.manifest import Manifest
    from ..runtime.executors.base import Executor
    from ..runtime.step import Step

    Rows = NDArray[np.float64]


OnTokens = Callable[[int, int], None]
"""Called with the number of processed tokens and the total."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of an evaluation. `nats` is the sum of -log p over the predicted tokens."""

    num_bytes: int
    num_tokens: int
    num_predicted: int
    nats: float
    context_tokens: int
    stride_tokens: int

    @property
    def perplexity(self) -> float:
        """The perplexity of the predicted tokens; infinity if it exceeds the range of a float."""
        try:
            return math.exp(self.nats / self.num_predicted)
        except OverflowError:
            return math.inf

    @property
    def bits_per_byte(self) -> float:
        """The information of the predicted tokens in bits, divided by the bytes of the text."""
        return self.nats / math.log(2) / self.num_bytes


@dataclass(frozen=True, slots=True)
class Divergence:
    """The difference between the predictions of two artifacts of the same model, in nats.

    `kl` is KL(other || this) per predicted token: its mean, 99th percentile and maximum.
    `same_top` is the fraction of tokens for which both predict the same most likely token.
    """

    kl_mean: float
    kl_p99: float
    kl_max: float
    same_top: float


def window_sizes(
    artifacts: Sequence[Artifact], context_tokens: int | None, stride_tokens: int | None
) -> tuple[int, int]:
    """The context and stride of windows for all artifacts; by default the maximum, and half of it.

    Artifacts that are compared need the same windows, since longer contexts improve predictions.
    Raises UsageError if the sizes do not fit.
    """
    limit = min(one.manifest.limits.max_context for one in artifacts)
    context = limit if context_tokens is None else context_tokens
    stride = max(1, context // 2) if stride_tokens is None else stride_tokens
    if not 2 <= context <= limit or not 1 <= stride < context:
        raise UsageError(
            f"a context of {context} and a stride of {stride} tokens do not fit",
            hint=f"context is 2..{limit}, and stride is less than context",
        )
    return context, stride


def evaluate_text(
    artifact: Artifact,
    text: str,
    *,
    context_tokens: int | None = None,
    stride_tokens: int | None = None,
    num_threads: int | None = None,
    on_tokens: OnTokens | None = None,
) -> Evaluation:
    """Evaluates a text in windows of `context_tokens` that start `stride_tokens` apart.

    Each token is counted once, in the first window that predicts it. The first token of the text
    is counted only if the tokenizer adds a token in front of it. `on_tokens(done, total)` is called
    before each window. Raises UsageError if the text has fewer than two tokens, or if the sizes do
    not fit.
    """
    tokens = _tokenize(artifact, text)
    context, stride = window_sizes((artifact,), context_tokens, stride_tokens)
    executor = _open(artifact, context, num_threads)
    rows = _rows(artifact.manifest)
    nats, manifest = 0.0, artifact.manifest
    try:
        for start, first, end in _windows(len(tokens), context, stride):
            if on_tokens is not None:
                on_tokens(first, len(tokens))
            for logits, targets in _window(
                executor, manifest, tokens[start:end], first - start, rows
            ):
                nats += _nats(logits, targets)
    finally:
        executor.close()
    num_bytes = len(text.encode())
    return Evaluation(num_bytes, len(tokens), len(tokens) - 1, nats, context, stride)


def compare_on_text(
    artifact: Artifact,
    other: Artifact,
    text: str,
    *,
    context_tokens: int | None = None,
    stride_tokens: int | None = None,
    num_threads: int | None = None,
    on_tokens: OnTokens | None = None,
) -> Divergence:
    """Compares the predictions of two artifacts, over the same windows as `evaluate_text`.

    Raises UsageError if they have different vocabularies or tokenize the text differently.
    """
    import numpy as np

    tokens = _tokenize(artifact, text)
    sizes = {one.manifest.model.vocab_size for one in (artifact, other)}
    if len(sizes) != 1 or _tokenize(other, text) != tokens:
        raise UsageError(
            "the two artifacts do not have the same tokens",
            where=f"{artifact.path} and {other.path}",
            hint="compare artifacts of one model, compiled in different ways",
        )
    both = (artifact, other)
    context, stride = window_sizes(both, context_tokens, stride_tokens)
    rows = min(_rows(one.manifest) for one in both)
    executors = [_open(one, context, num_threads) for one in both]
    kl: list[Rows] = []
    same = 0
    try:
        for start, first, end in _windows(len(tokens), context, stride):
            if on_tokens is not None:
                on_tokens(first, len(tokens))
            sides = [
                _window(executor, one.manifest, tokens[start:end], first - start, rows)
                for executor, one in zip(executors, both, strict=True)
            ]
            for (mine, _), (theirs, _) in zip(*sides, strict=True):
                p, q = _log_softmax(theirs), _log_softmax(mine)
                kl.append((np.exp(p) * (p - q)).sum(axis=1))
                same += int((mine.argmax(axis=1) == theirs.argmax(axis=1)).sum())
    finally:
        for executor in executors:
            executor.close()
    every = np.maximum(np.concatenate(kl), 0.0)  # rounding may leave a little below zero
    return Divergence(
        float(every.mean()), float(np.quantile(every, 0.99)), float(every.max()), same / len(every)
    )


def _tokenize(artifact: Artifact, text: str) -> list[int]:
    from ..runtime.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(artifact)
    if tokenizer is None:
        raise UsageError("the artifact has no tokenizer", where=str(artifact.path))
    tokens = tokenizer.encode(text)
    if len(tokens) < 2:
        raise UsageError(f"the text has {len(tokens)} tokens: nothing to predict")
    return tokens


def _rows(manifest: Manifest) -> int:
    """The number of tokens for which one step can return all logits."""
    return min(manifest.limits.step_tokens, manifest.limits.logit_rows)


def _windows(count: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first counted token, end) of each window; every token except 0 is counted once."""
    start, first = 0, 1
    while first < count:
        end = min(start + context, count)
        yield start, first, end
        start, first = start + stride, end


def _open(artifact: Artifact, context: int, num_threads: int | None) -> Executor:
    groups = artifact.manifest.kv.groups
    # One sequence alone; block 0 is never used.
    blocks = [-(-context // group.block_size) + 1 for group in groups]
    return open_bare(artifact, blocks, num_threads=num_threads)


def _window(
    executor: Executor, manifest: Manifest, tokens: Sequence[int], first: int, rows: int
) -> Iterator[tuple[Rows, Sequence[int]]]:
    """Yields logits and targets for tokens[first:], given the previous tokens in the window.

    Each step processes `rows` tokens and yields float64 `[n, vocab]` and n token ids.
    """
    import numpy as np

    # The last token predicts nothing that counts.
    for start in range(0, len(tokens) - 1, rows):
        end = min(start + rows, len(tokens) - 1)
        wanted = range(max(start, first - 1), end)
        logits = executor.run(_step(manifest, tokens, start, end, wanted)).astype(np.float64)
        if len(wanted):
            yield logits, tokens[wanted.start + 1 : wanted.stop + 1]


def _log_softmax(logits: Rows) -> Rows:
    import numpy as np

    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Rows = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _nats(logits: Rows, targets: Sequence[int]) -> float:
    """Sum of -log p of the targets."""
    import numpy as np

    return -float(_log_softmax(logits)[np.arange(len(targets)), np.asarray(targets)].sum())


def _step(manifest: Manifest, tokens: Sequence[int], start: int, end: int, wanted: range) -> Step:
    """A step with tokens[start:end] of one sequence, with blocks 1, 2, 3, ... in all groups."""
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
