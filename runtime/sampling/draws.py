"""Draws: how an executor takes each token of a step from a row of logits."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Draw(NamedTuple):
    """How one token is taken. The first five are the request's own, see `SamplingParams`.

    `row` is one of the step's `R`, `position` the token's in its sequence.
    """

    seed: int
    temperature: float
    top_p: float
    min_p: float
    top_k: int
    row: int
    choice: int
    position: int


LEAST_TEMPERATURE = sys.float_info.min
"""What lies below is zero to threads that flush such numbers."""

GREEDY = Draw(seed=0, temperature=0.0, top_p=1.0, min_p=0.0, top_k=0, row=0, choice=0, position=0)
"""Takes the greatest of the first row."""

_TYPES = (np.uint64, np.float64, np.float64, np.float64, np.int32, np.int32, np.int32, np.int32)

DRAW = np.dtype(list(zip(Draw._fields, _TYPES, strict=True)))
"""A `Draw` in an array, as generated code has it (`infc_draw` in `abi.hpp`)."""

Draws = NDArray[np.void]


def no_draws() -> Draws:
    """An array of none."""
    return np.zeros(0, DRAW)


def draws_of(entries: Iterable[Draw]) -> Draws:
    """An array `[D]` of these."""
    return np.array(list(entries), DRAW)


def next_draws(last: Draws) -> Draws:
    """The draws of the same requests one token later, from the same rows."""
    draws = last.copy()
    draws["position"] += 1
    return draws
