"""Evaluates an artifact on a text: perplexity, and the divergence from another model of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from ..ir.artifact import Artifact
from ..ir.errors import UsageError
from .bare_executor import open_bare
from .tally import Divergence, Tally, nats_of, perplexity

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..ir.manifest import Manifest
    from ..runtime.executors.base import Executor
    from ..runtime.scheduling.step import Step

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
        return perplexity(self.nats, self.num_predicted)

    @property
    def bits_per_byte(self) -> float:
        """The information of the predicted tokens in bits, divided by the bytes of the text."""
        return self.nats / math.log(2) / self.num_bytes


@dataclass(frozen=True, slots=True)
class Comparison:
    """The evaluations of two models of the same text, and how far their predictions are apart."""

    mine: Evaluation
    theirs: Evaluation
    divergence: Divergence


class OtherModel(Protocol):
    """What an artifact is compared with, if that is no artifact: see `SourceModel`."""

    @property
    def name(self) -> str:
        """What errors call it."""

    @property
    def vocab_size(self) -> int:
        """How many tokens it knows."""

    def tokenize(self, text: str) -> list[int] | None:
        """The tokens of a text; None if it has no tokenizer."""

    def window(
        self, tokens: Sequence[int], first: int, rows: int, on_share: Callable[[float], None]
    ) -> Iterator[tuple[Rows, Sequence[int]]]:
        """As `window_rows`; `on_share` is told how much of the window (0 .. 1) is done."""


SOURCE_CONTEXT: Final = 1024
"""Tokens of a window on a checkpoint by default: all pairs of them are held at once."""


def window_sizes(
    artifacts: Sequence[Artifact],
    context_tokens: int | None,
    stride_tokens: int | None,
    usual: int | None = None,
) -> tuple[int, int]:
    """The context and stride of windows for all artifacts; by default the maximum, and half of it.

    The default does not exceed `usual`.

    Artifacts that are compared need the same windows, since longer contexts improve predictions.
    Raises UsageError if the sizes do not fit.
    """
    limit = min(one.manifest.main.limits.max_context for one in artifacts)
    context = min(limit, usual or limit) if context_tokens is None else context_tokens
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
    rows = step_rows(artifact.manifest)
    nats, manifest = 0.0, artifact.manifest
    with open_for_window(artifact, context, num_threads) as executor:
        for start, first, end in windows(len(tokens), context, stride):
            if on_tokens is not None:
                on_tokens(first, len(tokens))
            for logits, targets in window_rows(
                executor, manifest, tokens[start:end], first - start, rows
            ):
                nats += nats_of(logits, targets)
    num_bytes = len(text.encode())
    return Evaluation(num_bytes, len(tokens), len(tokens) - 1, nats, context, stride)


def compare_on_text(
    artifact: Artifact,
    other: Artifact | OtherModel,
    text: str,
    *,
    context_tokens: int | None = None,
    stride_tokens: int | None = None,
    num_threads: int | None = None,
    on_tokens: OnTokens | None = None,
) -> Comparison:
    """Compares the predictions of two models, over the same windows as `evaluate_text`.

    `other` is another artifact of the model, or its checkpoint; of that, windows have
    `SOURCE_CONTEXT` tokens at most, unless `context_tokens` says otherwise. Raises UsageError if
    they have different vocabularies or tokenize the text differently.
    """
    tokens = _tokenize(artifact, text)
    _check_same_tokens(artifact, other, text, tokens)
    artifacts = [artifact, other] if isinstance(other, Artifact) else [artifact]
    usual = None if isinstance(other, Artifact) else SOURCE_CONTEXT
    context, stride = window_sizes(artifacts, context_tokens, stride_tokens, usual)
    tally = compare_tokens(artifact, other, tokens, context, stride, num_threads, on_tokens)
    size, count = len(text.encode()), len(tokens)
    mine, theirs = (
        Evaluation(size, count, count - 1, nats, context, stride)
        for nats in (tally.nats, tally.other_nats)
    )
    return Comparison(mine, theirs, tally.divergence())


def compare_tokens(
    artifact: Artifact,
    other: Artifact | OtherModel,
    tokens: Sequence[int],
    context: int,
    stride: int,
    num_threads: int | None = None,
    on_tokens: OnTokens | None = None,
) -> Tally:
    """As `compare_on_text`, for tokens that both models have."""
    both = [artifact, other] if isinstance(other, Artifact) else [artifact]
    rows = min(step_rows(one.manifest) for one in both)
    tally = Tally()
    with ExitStack() as stack:
        executors = [
            stack.enter_context(open_for_window(one, context, num_threads)) for one in both
        ]
        for start, first, end in windows(len(tokens), context, stride):
            window = tokens[start:end]

            def share(done: float, first: int = first, end: int = end) -> None:
                if on_tokens is not None:
                    on_tokens(first + int(done * (end - first)), len(tokens))

            share(0)
            sides = [
                window_rows(executor, one.manifest, window, first - start, rows)
                for executor, one in zip(executors, both, strict=True)
            ]
            if not isinstance(other, Artifact):
                sides.append(other.window(window, first - start, rows, share))
            for (ours, targets), (theirs, _) in zip(*sides, strict=True):
                tally.add(ours, theirs, targets)
    return tally


def _check_same_tokens(
    artifact: Artifact, other: Artifact | OtherModel, text: str, tokens: list[int]
) -> None:
    """UsageError unless both models have the same vocabulary and tokens of a text."""
    if isinstance(other, Artifact):
        size, name = other.manifest.model.vocab_size, str(other.path)
    else:
        size, name = other.vocab_size, other.name
    hint = "compare builds of one model, or a build with the checkpoint that it was compiled from"
    if artifact.manifest.model.vocab_size != size:
        raise UsageError(
            f"the vocabularies differ: {artifact.manifest.model.vocab_size} tokens and {size}",
            where=f"{artifact.path} and {name}",
            hint=hint,
        )
    theirs = _tokenize(other, text) if isinstance(other, Artifact) else other.tokenize(text)
    if theirs is not None and theirs != tokens:
        raise UsageError(
            "the tokenizers differ: the text has other tokens",
            where=f"{artifact.path} and {name}",
            hint=hint,
        )


def _tokenize(artifact: Artifact, text: str) -> list[int]:
    from ..runtime.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(artifact)
    if tokenizer is None:
        raise UsageError("the artifact has no tokenizer", where=str(artifact.path))
    tokens = tokenizer.encode(text)
    if len(tokens) < 2:
        raise UsageError(f"the text has {len(tokens)} tokens: nothing to predict")
    return tokens


def step_rows(manifest: Manifest) -> int:
    """The number of tokens for which one step can return all logits."""
    return min(manifest.main.limits.step_tokens, manifest.main.limits.logit_rows)


def windows(count: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first counted token, end) of each window; every token except 0 is counted once."""
    start, first = 0, 1
    while first < count:
        end = min(start + context, count)
        yield start, first, end
        start, first = start + stride, end


def open_for_window(
    artifact: Artifact, context: int, num_threads: int | None
) -> AbstractContextManager[Executor]:
    """An executor for one sequence of `context` tokens."""
    groups = artifact.manifest.main.resources
    # Block 0 is never used.
    blocks = [-(-context // group.block_size) + 1 for group in groups]
    return open_bare(artifact, blocks, num_threads=num_threads)


def window_rows(
    executor: Executor, manifest: Manifest, tokens: Sequence[int], first: int, rows: int
) -> Iterator[tuple[Rows, Sequence[int]]]:
    """Yields logits and targets for tokens[first:], given the previous tokens in the window.

    Each step processes `rows` tokens and yields float64 `[n, vocab]` and n token ids.
    """
    import numpy as np

    from ..runtime.executors.base import run_step

    # The last token predicts nothing that counts.
    for start in range(0, len(tokens) - 1, rows):
        end = min(start + rows, len(tokens) - 1)
        wanted = range(max(start, first - 1), end)
        step = _step(manifest, tokens, start, end, wanted)
        logits = run_step(executor, step).logits.astype(np.float64)
        if len(wanted):
            yield logits, tokens[wanted.start + 1 : wanted.stop + 1]


def _step(manifest: Manifest, tokens: Sequence[int], start: int, end: int, wanted: range) -> Step:
    """A step with tokens[start:end] of one sequence, with blocks 1, 2, 3, ... in all groups."""
    import numpy as np

    from ..runtime.scheduling.step import Step

    def array(values: object) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
        return np.ascontiguousarray(values, dtype=np.int32)

    positions = array(np.arange(start, end))
    sizes = [group.block_size for group in manifest.main.resources]
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
