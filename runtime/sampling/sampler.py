"""What it means to take a token from a row of logits, in numpy.

Executors draw tokens from `Step.draws` to this meaning; those whose head computes all rows call it
(`head_output`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .draws import Draw
from .token_logprobs import TokenLogprobs
from .top_tokens import Logits, greatest, greatest_values

_FEW = 512
_BLOCK = 256


@dataclass(slots=True)  # not frozen: one is made for every token, see `outputs.py`
class Sample:
    """The token of one row, None where its logits have no finite maximum, or `error` says why."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None
    error: str | None = None


class Distribution(Protocol):
    """What shapes the distribution that a token is drawn from, as `SamplingParams` has it."""

    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def top_k(self) -> int: ...
    @property
    def min_p(self) -> float: ...


def drawn_token(row: Logits, entry: Draw) -> int | None:
    """What a draw takes from its row of logits [V]; None as in `Sample`."""
    token = greatest_token(row)
    if token is None or entry.temperature == 0.0:
        return token
    return draw(row, entry, uniform(entry.seed, choice=entry.choice, position=entry.position))


def greatest_token(row: Logits) -> int | None:
    """The id of the greatest logit, the lowest of equals; None where it is not a finite number."""
    token = int(row.argmax())  # the first NaN where there is one
    return token if math.isfinite(row[token]) else None


def uniform(seed: int, *, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on its three arguments alone (Philox, counter-based)."""
    bits = np.random.Philox(
        key=np.array([seed, 0], np.uint64), counter=np.array([position, choice, 0, 0], np.uint64)
    )
    return float(bits.random_raw() >> 11) * 2.0**-53


def draw(row: Logits, shape: Distribution, u: float) -> int:
    """The token at quantile `u` of the distribution that temperature and `support` leave.

    Candidates keep the order of their ids, so equal logits are resolved by the lower id.
    """
    kept = support(row, shape)
    scores = row if kept is None else row[kept]
    index = _at_quantile(_weights(scores, shape.temperature), u)
    return index if kept is None else int(kept[index])


def _at_quantile(weights: Logits, u: float) -> int:
    """The first index at which the running sum exceeds `u` of the total; never one of weight 0.

    The sum runs over blocks first, and then inside of one: a sum of the whole row is slow.
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64).cumsum()
    wanted = u * sums[-1]
    block = _first_above(sums, wanted)
    before = sums[block - 1] if block else 0.0
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
    return block * _BLOCK + _first_above(inside, wanted - before)


def _first_above(cumulative: NDArray[np.float64], wanted: float) -> int:
    """Where a running sum first exceeds `wanted`; where it last grows, if rounding denies that."""
    index = np.searchsorted(cumulative, wanted, side="right")
    return int(min(index, np.searchsorted(cumulative, cumulative[-1], side="left")))


def support(row: Logits, shape: Distribution) -> NDArray[np.intp] | None:
    """The ids that top-k, top-p and min-p keep, ascending; None for all of them.

    Top-k keeps exactly k, the lower id first among equals. Top-p (Holtzman et al. 2020) keeps
    the shortest run of the likeliest whose share, of what top-k kept, reaches `top_p`. Min-p
    (Nguyen et al. 2024) keeps what is at least `min_p` times as likely as the likeliest.
    """
    size = len(row)
    count = size if shape.top_k == 0 else min(shape.top_k, size)
    if shape.top_p < 1.0:
        count = _nucleus(row, count, shape)
    kept = None if count == size else greatest(row, count)
    if shape.min_p > 0.0:
        scores = row if kept is None else row[kept]
        # A share of the greatest is a distance from it in logits.
        near = scores >= float(scores.max()) + shape.temperature * math.log(shape.min_p)
        kept = np.flatnonzero(near) if kept is None else kept[near]
    return kept


def _nucleus(row: Logits, count: int, shape: Distribution) -> int:
    """How many of the `count` greatest top-p keeps."""
    size = len(row)
    few = min(count, _FEW)
    total = None
    if few < count == size:
        total = float(_weights(row, shape.temperature).sum(dtype=np.float64))
    # Few tokens mostly hold the share that is wanted; sorting them all is for flat rows.
    for tried in (few, count) if total is not None else (count,):
        # Sorted by value alone: which of equals are kept is settled by id later.
        top = greatest_values(row, tried)
        cumulative = _weights(top, shape.temperature).cumsum(dtype=np.float64)
        whole = cumulative[-1] if total is None else total
        reached = int(np.searchsorted(cumulative, shape.top_p * whole, side="left"))
        if reached < tried:
            return reached + 1
    return count


def _weights(scores: Logits, temperature: float) -> Logits:
    """Unnormalised probabilities, float32; the greatest score weighs 1. Sum them in float64."""
    # A tiny temperature may overflow to minus infinity, which weighs 0 as it should; one that is
    # 0 in float32 would make the greatest weigh nothing that is a number.
    divisor = max(np.float32(temperature), np.finfo(np.float32).tiny)
    with np.errstate(over="ignore"):
        scaled = (scores - scores.max()) / divisor
    weights: Logits = np.exp(scaled, out=scaled)
    return weights
