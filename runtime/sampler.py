"""The sampler: rows of logits to tokens and log-probabilities, each row by itself (numpy)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .logits_adjuster import ConstraintError
from .outputs import TokenLogprobs
from .request import Request
from .sampling_params import SamplingParams
from .token_logprobs import raw_logprobs
from .top_tokens import Logits, greatest, greatest_values

_FEW = 512
_BLOCK = 256


@dataclass(slots=True)  # not frozen: one is made for every token, see `outputs.py`
class Sample:
    """The token of one row, None where its logits have no finite maximum, or `error` says why."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None
    error: str | None = None


def sample_rows(logits: Logits, requests: Sequence[Request]) -> list[Sample]:
    """One token a row of `logits` [R, V]; row i belongs to `requests[i]`.

    A row depends on its own logits, parameters, tokens, seed, choice and position alone. The
    log-probabilities are of the row as it came.
    """
    best = logits.argmax(axis=1)  # the first of equals, and the first NaN where there is one
    # A maximum of NaN or infinity means that the row holds nothing to choose from.
    valid = np.isfinite(logits[np.arange(len(best)), best])
    samples = []
    for raw, token, usable, request in zip(
        logits, best.tolist(), valid.tolist(), requests, strict=True
    ):
        row, params = raw, request.params
        if usable and request.adjuster is not None:
            try:
                row = request.adjuster.apply(raw, request.token_ids)
            except ConstraintError as error:
                samples.append(Sample(None, error=str(error)))
                continue
            token = int(row.argmax())
            usable = math.isfinite(row[token])
        if not usable:
            samples.append(Sample(None))
            continue
        if params.temperature > 0.0:
            u = uniform(request.seed, choice=request.choice, position=len(request.token_ids))
            token = draw(row, params, u)
        count = request.num_logprobs
        samples.append(Sample(token, None if count is None else raw_logprobs(raw, token, count)))
    return samples


def uniform(seed: int, *, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on its three arguments alone (Philox, counter-based)."""
    bits = np.random.Philox(
        key=np.array([seed, 0], np.uint64), counter=np.array([position, choice, 0, 0], np.uint64)
    )
    return float(bits.random_raw() >> 11) * 2.0**-53


def draw(row: Logits, params: SamplingParams, u: float) -> int:
    """The token at quantile `u` of the distribution that temperature and `support` leave.

    Candidates keep the order of their ids, so equal logits are resolved by the lower id.
    """
    kept = support(row, params)
    scores = row if kept is None else row[kept]
    index = _at_quantile(_weights(scores, params.temperature), u)
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


def support(row: Logits, params: SamplingParams) -> NDArray[np.intp] | None:
    """The ids that top-k, top-p and min-p keep, ascending; None for all of them.

    Top-k keeps exactly k, the lower id first among equals. Top-p (Holtzman et al. 2020) keeps
    the shortest run of the likeliest whose share, of what top-k kept, reaches `top_p`. Min-p
    (Nguyen et al. 2024) keeps what is at least `min_p` times as likely as the likeliest.
    """
    size = len(row)
    count = size if params.top_k == 0 else min(params.top_k, size)
    if params.top_p < 1.0:
        count = _nucleus(row, count, params)
    kept = None if count == size else greatest(row, count)
    if params.min_p > 0.0:
        scores = row if kept is None else row[kept]
        # A share of the greatest is a distance from it in logits.
        near = scores >= float(scores.max()) + params.temperature * math.log(params.min_p)
        kept = np.flatnonzero(near) if kept is None else kept[near]
    return kept


def _nucleus(row: Logits, count: int, params: SamplingParams) -> int:
    """How many of the `count` greatest top-p keeps."""
    size = len(row)
    few = min(count, _FEW)
    total = None
    if few < count == size:
        total = float(_weights(row, params.temperature).sum(dtype=np.float64))
    # Few tokens mostly hold the share that is wanted; sorting them all is for flat rows.
    for tried in (few, count) if total is not None else (count,):
        # Sorted by value alone: which of equals are kept is settled by id later.
        top = greatest_values(row, tried)
        cumulative = _weights(top, params.temperature).cumsum(dtype=np.float64)
        whole = cumulative[-1] if total is None else total
        reached = int(np.searchsorted(cumulative, params.top_p * whole, side="left"))
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
