"""Pooling: rows of hidden states to one vector a prompt, whatever its chunks and neighbours."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ...ir.errors import RequestError

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


def unit(vector: Vector) -> Vector:
    """The vector at Euclidean length 1; zeros stay zeros."""
    length = float(np.sqrt(np.square(vector, dtype=np.float64).sum()))
    return (vector / length).astype(np.float32) if length > 0.0 else vector
