"""What a request gives back: text, tokens, log-probabilities, why it ended, and times.

What is made for every token is not frozen, though nothing changes it: a frozen dataclass takes
three times as long to make, which at 32 sequences was half of the host's time of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..sampling.token_logprobs import TokenLogprobs

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True, kw_only=True)
class RequestMetrics:
    """Monotonic times in seconds, None for what has not happened, and two counts."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        if self.first_token_time is None:
            return None
        return self.first_token_time - self.arrival_time


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One completion, or what one or several steps added to it.

    `index` is the number of the completion within its request. `stop_reason` is the stop string
    or the token id that ended it, or None if it ended for another reason. `logprobs` has one
    entry per token if requested, and is None otherwise. `cumulative_logprob` is the sum of all
    log-probabilities so far; it is set with `logprobs`, and if `best_of` selects completions.
    `text_offsets` are also set with `logprobs`: the position in the text of the completion at
    which each token begins. If the text of a token is held back because it may become part of a
    stop string, its offset follows in a later step; a whole completion has one per token.
    """

    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    cumulative_logprob: float | None = None
    text_offsets: tuple[int, ...] | None = None


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """The answer to one request, or what one or several steps added to it.

    `outputs` contains the completions that changed, at least one, by ascending `index`. If
    `finished` is true, this is the last output. `prompt_logprobs`, if requested, is part of the
    first output: one entry per token of the prompt, where the first is None because it has no
    context. `embedding` [hidden_width] is the result of a request that pools hidden states, which
    generates no tokens. `error` explains the finish reason "error". `seed` is that of the random
    numbers, also where the request was given none; None if it generates no tokens.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    metrics: RequestMetrics
    finished: bool = False
    prompt: str | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    embedding: NDArray[np.float32] | None = field(default=None, compare=False)
    error: str | None = None
    seed: int | None = None


def merge_outputs(parts: Sequence[RequestOutput]) -> RequestOutput:
    """The whole answer from the parts that steps gave, in their order; at least one part."""
    pieces: dict[int, list[CompletionOutput]] = {}
    for part in parts:
        for piece in part.outputs:
            pieces.setdefault(piece.index, []).append(piece)
    prompts = [p.prompt_logprobs for p in parts if p.prompt_logprobs is not None]
    errors = [part.error for part in parts if part.error is not None]
    return replace(
        parts[-1],
        outputs=tuple(merge_completions(pieces[index]) for index in sorted(pieces)),
        prompt_logprobs=prompts[0] if prompts else None,
        error=errors[0] if errors else None,
    )


def merge_completions(pieces: Sequence[CompletionOutput]) -> CompletionOutput:
    """One completion from what steps added to it, in their order; at least one piece."""
    logprobs = offsets = None
    if any(piece.text_offsets is not None for piece in pieces):
        offsets = tuple(offset for piece in pieces for offset in piece.text_offsets or ())
    if any(piece.logprobs is not None for piece in pieces):
        logprobs = tuple(entry for piece in pieces for entry in piece.logprobs or ())
    sums = [p.cumulative_logprob for p in pieces if p.cumulative_logprob is not None]
    return replace(
        pieces[-1],
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        logprobs=logprobs,
        cumulative_logprob=sums[-1] if sums else None,
        text_offsets=offsets,
    )
