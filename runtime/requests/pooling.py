"""Pooling: rows of hidden states to one vector a prompt, whatever its chunks and neighbours."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ...ir.errors import RequestError
from ..faults import note_fault

if TYPE_CHECKING:
    from ..scheduling.step import Step

Pooling = Literal["last", "mean"]
"""The last token's hidden state, or the mean over all tokens of the prompt."""

Vector = NDArray[np.float32]


class Pool:
    """Takes in the rows of one prompt in their order, and gives one vector [hidden_width]."""

    __slots__ = ("_count", "_total", "every_row")

    def __init__(self, pooling: Pooling, width: int) -> None:
        if pooling not in get_args(Pooling):
            names = " or ".join(map(repr, get_args(Pooling)))
            raise RequestError(f"pooling is {pooling!r}, not {names}", field="pooling")
        self.every_row = pooling == "mean"
        self._total = np.zeros(width, np.float64)
        self._count = 0

    def add(self, rows: Vector) -> None:
        """Take in rows [N, hidden_width]."""
        for row in rows:  # one after the other, so that chunks never change the sum
            self._total += row
        self._count += len(rows)

    @property
    def vector(self) -> Vector:
        """The mean of what was taken in."""
        return (self._total / self._count).astype(np.float32)

    @property
    def is_finite(self) -> bool:
        """Whether nothing that was taken in was infinite or NaN."""
        return bool(np.isfinite(self._total).all())


def asks_for_hidden(step: Step, width: int | None) -> Step:
    """The step with room for hidden states, where any of its requests pools them."""
    receivers = [*step.sampled, *(rows.request for rows in step.prompt_rows)]
    if not any(request.pool is not None for request in receivers):
        return step
    assert width is not None, "requests that pool are refused where there are no hidden states"
    return replace(
        step,
        hidden=np.empty((len(step.logits_index), width), np.float32),
    )


def pool_rows(step: Step) -> dict[str, str]:
    """Hand the rows of hidden states that a step gave to the requests that pool them.

    What failed of those that cannot take them, by the id of the request.
    """
    faults: dict[str, str] = {}
    if step.hidden is None:
        return faults
    places = [(rows.request, rows.first_row, rows.count) for rows in step.prompt_rows]
    places += [(who, row, 1) for who, row in zip(step.sampled, step.sampled_rows, strict=True)]
    for request, first, count in places:
        if request.pool is not None:
            try:
                request.pool.add(step.hidden[first : first + count])
            except Exception as error:
                faults[request.request_id] = note_fault("pooling", error)
    return faults


def unit(vector: Vector) -> Vector:
    """The vector at Euclidean length 1; zeros stay zeros."""
    length = float(np.sqrt(np.square(vector, dtype=np.float64).sum()))
    return (vector / length).astype(np.float32) if length > 0.0 else vector
