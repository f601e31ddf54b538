"""Draws: how an executor takes each token of a step from a row of logits."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ..requests.request import Request


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


_LEAST = sys.float_info.min
"""Of temperatures: what lies below is zero to threads that flush such numbers."""

GREEDY = Draw(seed=0, temperature=0.0, top_p=1.0, min_p=0.0, top_k=0, row=0, choice=0, position=0)
"""Takes the greatest of the first row."""

_TYPES = (np.uint64, np.float64, np.float64, np.float64, np.int32, np.int32, np.int32, np.int32)

DRAW = np.dtype(list(zip(Draw._fields, _TYPES, strict=True)))
"""A `Draw` in an array, as `infc_draw` in `codegen/cpp/kernels/abi.hpp` has it."""

Draws = NDArray[np.void]


def no_draws() -> Draws:
    """An array of none."""
    return np.zeros(0, DRAW)


def draws_of(wanted: Iterable[tuple[Request, int]]) -> Draws:
    """The draws `[D]` of these requests' next tokens, each from the row beside it."""
    return np.array([_draw(request, row) for request, row in wanted], DRAW)


def next_draws(last: Draws) -> Draws:
    """The draws of the same requests one token later, from the same rows."""
    draws = last.copy()
    draws["position"] += 1
    return draws


def _draw(request: Request, row: int) -> Draw:
    params = request.params
    return Draw(
        seed=request.seed,
        temperature=max(params.temperature, _LEAST) if params.temperature else 0.0,
        top_p=params.top_p,
        min_p=params.min_p,
        top_k=params.top_k,
        row=row,
        choice=request.choice,
        position=len(request.token_ids),
    )
