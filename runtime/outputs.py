"""What a request gives back: text, tokens, log-probabilities, why it ended, and times."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities under the raw logits: of one token, and of the likeliest ones.

    `rank` is 1 for the likeliest token of all; the lower id comes first among equals.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One completion, or what one step added to it.

    `stop_reason` is the stop string or the token id that ended it (None for any other end).
    `logprobs` is None unless asked for, else one entry a token.
    """

    index: int = 0
    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """The answer to one request, or what one step added to it. `error` explains an "error" end."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    metrics: RequestMetrics
    prompt: str | None = None
    error: str | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will come."""
        return self.outputs[0].finish_reason is not None


def merge_outputs(parts: list[RequestOutput]) -> RequestOutput:
    """The whole answer from the parts that steps gave, in their order; at least one part."""
    completions = [part.outputs[0] for part in parts]
    last = completions[-1]
    logprobs = None
    if any(c.logprobs is not None for c in completions):
        logprobs = tuple(entry for c in completions for entry in c.logprobs or ())
    whole = replace(
        last,
        text="".join(c.text for c in completions),
        token_ids=tuple(token for c in completions for token in c.token_ids),
        logprobs=logprobs,
    )
    return replace(parts[-1], outputs=(whole,))
