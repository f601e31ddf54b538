"""The greatest entries of a row of logits, ties to the lower id, without sorting the row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]

_MIN_WIDTH = 4
_LEAST_HANDS = 512  # fewer are no faster: the maximum runs along the hands


def ranked(row: Logits, count: int) -> NDArray[np.intp]:
    """The ids of the `count` greatest entries, greatest first, the lower id first among equals."""
    ids = greatest(row, count)
    return ids[np.argsort(-row[ids], kind="stable")]


def greatest(row: Logits, count: int) -> NDArray[np.intp]:
    """The ids of the `count` greatest entries, ascending, the lower id first among equals."""
    size = len(row)
    if count >= size:
        return np.arange(size)
    ids = _candidates(row, count)
    values = row if ids is None else row[ids]
    threshold = np.partition(values, len(values) - count)[len(values) - count]
    chosen = values > threshold
    equal = np.flatnonzero(values == threshold)
    chosen[equal[: count - np.count_nonzero(chosen)]] = True
    return np.flatnonzero(chosen) if ids is None else ids[chosen]


def greatest_values(row: Logits, count: int) -> Logits:
    """The values of the `count` greatest entries, greatest first."""
    ids = _candidates(row, count) if count < len(row) else None
    values: Logits = np.sort(row if ids is None else row[ids])[::-1]
    return values[:count]


def _candidates(row: Logits, count: int) -> NDArray[np.intp] | None:
    """Ids, ascending, that hold the `count` greatest among few others; None for a short row.

    The row is dealt into many more than `count` hands. The `count` greatest of the hands' best
    cards are `count` entries, so nothing below the least of them is wanted.
    """
    hands = max(4 * count, _LEAST_HANDS)
    width = len(row) // hands
    if width < _MIN_WIDTH:
        return None
    best = row[: width * hands].reshape(width, hands).max(axis=0)
    floor = np.partition(best, hands - count)[hands - count]
    return np.flatnonzero(row >= floor)
