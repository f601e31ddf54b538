"""Log-probabilities of tokens under the raw logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .top_tokens import Logits, ranked


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural, from the raw logits) of a token and of the most likely ones.

    `rank` is 1 for the most likely token; among equally likely tokens, the lowest id comes first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int = 1


def raw_logprobs(row: Logits, token: int, count: int) -> TokenLogprobs:
    """Log-probabilities of `token` and of the `count` likeliest, without temperature or cuts."""
    peak = float(row.max())
    normaliser = peak + math.log(float(np.exp(row.astype(np.float64) - peak).sum()))
    top = ranked(row, min(count, len(row))) if count else ()
    score = row[token]
    return TokenLogprobs(
        token_id=token,
        logprob=float(score) - normaliser,
        top=tuple((int(i), float(row[i]) - normaliser) for i in top),
        rank=1 + int(np.count_nonzero(row > score) + np.count_nonzero(row[:token] == score)),
    )


def prompt_logprobs(rows: Logits, tokens: Sequence[int], count: int) -> list[TokenLogprobs] | None:
    """One entry a row of `rows` [N, V], for the token that follows there in the prompt.

    None where a row has no finite maximum.
    """
    if not np.isfinite(rows.max(axis=1, initial=-np.inf)).all():
        return None
    return [raw_logprobs(row, token, count) for row, token in zip(rows, tokens, strict=True)]
