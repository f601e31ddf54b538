"""The sampler: rows of logits to tokens and log-probabilities, each row by itself (numpy)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .outputs import TokenLogprobs
from .request import Request
from .sampling_params import SamplingParams

_FEW = 512

Logits = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sample:
    """The token of one row, None where its logits have no finite maximum."""

    token_id: int | None
    logprobs: TokenLogprobs | None = None


def sample_rows(logits: Logits, requests: Sequence[Request]) -> list[Sample]:
    """One token a row of `logits` [R, V]; row i belongs to `requests[i]`.

    A row depends on its own logits, parameters, seed and position alone.
    """
    best = logits.argmax(axis=1)  # the first of equals, and the first NaN where there is one
    # A maximum of NaN or infinity means that the row holds nothing to choose from.
    valid = np.isfinite(logits[np.arange(len(best)), best])
    samples = []
    for row, token, usable, request in zip(
        logits, best.tolist(), valid.tolist(), requests, strict=True
    ):
        params = request.params
        if not usable:
            samples.append(Sample(None))
            continue
        if params.temperature > 0.0:
            u = uniform(request.seed, choice=0, position=len(request.token_ids))
            token = draw(row, params, u)
        logprobs = None if params.logprobs is None else raw_logprobs(row, token, params.logprobs)
        samples.append(Sample(token, logprobs))
    return samples


def uniform(seed: int, *, choice: int, position: int) -> float:
    """A number in [0, 1) that depends on its three arguments alone (Philox, counter-based)."""
    bits = np.random.Philox(
        key=np.array([seed, 0], np.uint64), counter=np.array([position, choice, 0, 0], np.uint64)
    )
    return float(bits.random_raw() >> 11) * 2.0**-53


def draw(row: Logits, params: SamplingParams, u: float) -> int:
    """The token at quantile `u` of the row's distribution: temperature, then top-k, then top-p.

    Candidates keep the order of their ids, so equal logits are resolved by the lower id.
    """
    kept = support(row, params)
    scores = row if kept is None else row[kept]
    cumulative = _weights(scores, params.temperature).cumsum()
    index = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    # u * total may round up to total, past which lie only tokens of weight zero.
    index = min(index, int(np.searchsorted(cumulative, cumulative[-1], side="left")))
    return index if kept is None else int(kept[index])


def support(row: Logits, params: SamplingParams) -> NDArray[np.intp] | None:
    """The ids that top-k and top-p keep, ascending; None for all of them.

    Top-k keeps exactly k, the lower id first among equals. Top-p keeps the shortest run of the
    likeliest whose share, of what top-k kept, reaches `top_p`.
    """
    size = len(row)
    count = size if params.top_k == 0 else min(params.top_k, size)
    if params.top_p < 1.0:
        count = _nucleus(row, count, params)
    return None if count == size else _greatest(row, count)


def _nucleus(row: Logits, count: int, params: SamplingParams) -> int:
    """How many of the `count` greatest top-p keeps."""
    size = len(row)
    few = min(count, _FEW)
    total = float(_weights(row, params.temperature).sum()) if few < count == size else None
    # Few tokens mostly hold the share that is wanted; sorting them all is for flat rows.
    for tried in (few, count) if total is not None else (count,):
        top = row if tried == size else np.partition(row, size - tried)[size - tried :]
        # Sorted by value alone: which of equals are kept is settled by id later.
        cumulative = _weights(np.sort(top)[::-1], params.temperature).cumsum()
        whole = cumulative[-1] if total is None else total
        reached = int(np.searchsorted(cumulative, params.top_p * whole, side="left"))
        if reached < tried:
            return reached + 1
    return count


def ranked(row: Logits, count: int) -> NDArray[np.intp]:
    """The ids of the `count` greatest entries, greatest first, the lower id first among equals."""
    ids = _greatest(row, count)
    return ids[np.argsort(-row[ids], kind="stable")]


def raw_logprobs(row: Logits, token: int, count: int) -> TokenLogprobs:
    """Log-probabilities of `token` and of the `count` likeliest, without temperature or cuts."""
    peak = float(row.max())
    normaliser = peak + math.log(float(np.exp(row.astype(np.float64) - peak).sum()))
    top = ranked(row, min(count, len(row))) if count else ()
    return TokenLogprobs(
        token_id=token,
        logprob=float(row[token]) - normaliser,
        top=tuple((int(i), float(row[i]) - normaliser) for i in top),
    )


def _greatest(row: Logits, count: int) -> NDArray[np.intp]:
    """The ids of the `count` greatest entries, ascending, the lower id first among equals."""
    size = len(row)
    if count >= size:
        return np.arange(size)
    threshold = np.partition(row, size - count)[size - count]
    chosen = row > threshold
    equal = np.flatnonzero(row == threshold)
    chosen[equal[: count - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen)


def _weights(scores: Logits, temperature: float) -> NDArray[np.float64]:
    """Unnormalised probabilities; the greatest score weighs 1."""
    wide = scores.astype(np.float64)
    wide -= wide.max()
    # A tiny temperature may overflow to minus infinity, which weighs 0 as it should.
    with np.errstate(over="ignore"):
        wide /= temperature
    weights: NDArray[np.float64] = np.exp(wide)
    return weights
