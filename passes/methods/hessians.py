"""Second moments of a matrix's inputs, summed in one order whatever the number of threads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from itertools import product
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

TILE: Final = 512
"""Columns of a tile of the result, which one thread sums up alone, window by window."""


def hessian(windows: Sequence[torch.Tensor], pool: Executor) -> torch.Tensor:
    """The mean over all tokens of `x.T @ x`, `[K, K]` in float32, for windows `[.., K]`.

    Of the tiles below the diagonal nothing is computed: they are zeros.
    """
    import torch

    depth = windows[0].shape[-1]
    tokens = sum(x.numel() // depth for x in windows)
    result = torch.zeros(depth, depth)
    starts = range(0, depth, TILE)

    def tile(place: tuple[int, int]) -> None:
        top, left = (slice(first, first + TILE) for first in place)
        total = result[top, left]
        for x in windows:
            rows = x.reshape(-1, depth)
            total.addmm_(rows[:, top].T, rows[:, left], alpha=1 / tokens)

    _all(pool.map(tile, [(a, b) for a, b in product(starts, starts) if a <= b]))
    return result


def add_cross_moments(
    result: torch.Tensor,
    lefts: Sequence[torch.Tensor],
    windows: Sequence[torch.Tensor],
    tokens: int,
    pool: Executor,
) -> None:
    """Adds the sum over windows of `y.T @ x`, divided by `tokens`, to `[R, K]` in float32.

    For what `y` is in each window, transposed (`[R, tokens]`), and windows `[.., K]` of `x`.
    """
    rows, depth = result.shape

    def tile(place: tuple[int, int]) -> None:
        top, left = (slice(first, first + TILE) for first in place)
        total = result[top, left]
        for y, x in zip(lefts, windows, strict=True):
            total.addmm_(y[top], x.reshape(-1, depth)[:, left], alpha=1 / tokens)

    _all(pool.map(tile, product(range(0, rows, TILE), range(0, depth, TILE))))


def _all(results: Iterable[None]) -> None:
    """Wait for every result; the first error is raised."""
    for _ in results:
        pass
