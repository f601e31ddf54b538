"""Adds up how far two models' predictions of a text are apart, a few rows of logits at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Rows = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Divergence:
    """The difference between the predictions of two models, in nats.

    `kl` is KL(other || this) per predicted token: its mean, 99th percentile and maximum.
    `same_top` is the fraction of tokens for which both predict the same most likely token.
    """

    kl_mean: float
    kl_p99: float
    kl_max: float
    same_top: float


@dataclass(slots=True)
class Tally:
    """Takes logits of both models at the same positions; nats are sums of -log p of the targets."""

    nats: float = 0.0
    other_nats: float = 0.0
    num_predicted: int = 0
    _same: int = 0
    _kl: list[Rows] = field(default_factory=list)

    def add(self, mine: Rows, others: Rows, targets: Sequence[int]) -> None:
        """Logits `[n, V]` of this model and the other, and the n tokens that followed."""
        self.add_logarithms(log_softmax(mine), log_softmax(others), targets)

    def add_logarithms(self, mine: Rows, others: Rows, targets: Sequence[int]) -> None:
        """As `add`, for the logarithms of probabilities, as `log_softmax` gives them."""
        q, p = mine, others
        with np.errstate(invalid="ignore"):
            terms = np.exp(p) * (p - q)
        # Where p is 0 (a logit of -inf) the term is 0, whatever q says.
        self._kl.append(np.where(np.isneginf(p), 0.0, terms).sum(axis=1))
        self._same += int((q.argmax(axis=1) == p.argmax(axis=1)).sum())
        at = np.arange(len(targets)), np.asarray(targets)
        self.nats -= float(q[at].sum())
        self.other_nats -= float(p[at].sum())
        self.num_predicted += len(targets)

    def divergence(self) -> Divergence:
        """Over all that was added."""
        every = np.maximum(np.concatenate(self._kl), 0.0)  # rounding may leave a little below zero
        with np.errstate(invalid="ignore"):
            high = float(np.quantile(every, 0.99))
        if math.isnan(high) and not np.isnan(every).any():
            high = math.inf  # between two infinities there is nothing to interpolate
        return Divergence(
            float(every.mean()),
            high,
            float(every.max()),
            self._same / self.num_predicted,
        )


def log_softmax(logits: Rows) -> Rows:
    """The logarithms of the probabilities that logits `[n, V]` stand for."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Rows = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def nats_of(logits: Rows, targets: Sequence[int]) -> float:
    """Sum of -log p of the targets."""
    return -float(log_softmax(logits)[np.arange(len(targets)), np.asarray(targets)].sum())


def perplexity(nats: float, num_predicted: int) -> float:
    """The perplexity of predicted tokens; infinity if it exceeds the range of a float."""
    try:
        return math.exp(nats / num_predicted)
    except OverflowError:
        return math.inf
