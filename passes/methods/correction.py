"""Moves matrices so that products of inputs that have drifted are near those of the source model.

Li et al. 2025 (GPTAQ, https://arxiv.org/abs/2504.02692) minimise the distance of the quantised
products from those that the source model has at the same place, `|W X - Q Y|`, where `X` are its
inputs and `Y` those that quantised matrices before it give. The matrix that does so without any
rounding is `W + W (X - Y) Y.T (Y Y.T)^-1`; feedback then rounds that one. It is found by ridge
regression here, and only a part of the way is gone: a text of a few thousand tokens says little
about some thousand columns. Where that does not help on windows that were left out, nothing is
moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .hessians import TILE, add_cross_moments

if TYPE_CHECKING:
    import torch

HELD_OUT: Final = 4
"""Each so-many-th window is left out of the regression, and says whether its result holds."""
_TESTED_ROWS: Final = 2048
_WINDOWS: Final = 4
"""How many windows are taken at a time."""
RIDGE: Final = 0.2
"""What is added to the diagonal of the regression, as a share of its mean."""


@dataclass(frozen=True, slots=True)
class Drift:
    """Inputs `[.., K]` of the same product in each window: in the source model, and quantised."""

    source: Sequence[torch.Tensor]
    quantized: Sequence[torch.Tensor]

    def parts(self, every: int) -> tuple[Drift, Drift]:
        """Two parts of the windows: all but each `every`-th one, and those."""
        fitted, held = (
            [i for i in range(len(self.source)) if (i % every == every - 1) == is_held]
            for is_held in (False, True)
        )
        return self._of(fitted), self._of(held)

    def _of(self, windows: Sequence[int]) -> Drift:
        return Drift([self.source[i] for i in windows], [self.quantized[i] for i in windows])

    @property
    def num_tokens(self) -> int:
        """Tokens of all windows."""
        return sum(one.numel() // one.shape[-1] for one in self.source)

    @property
    def is_zero(self) -> bool:
        """Whether nothing that was quantised is before the product."""
        import torch

        return all(map(torch.equal, self.source, self.quantized))


@dataclass(frozen=True, slots=True)
class Correction:
    """How all matrices that multiply the same inputs are moved.

    `shift` `[K, K]` is what a matrix is multiplied by to give what is added to it; or, for few
    rows, `added` has that sum `[N, K]` for every one of the matrices.
    """

    shift: torch.Tensor | None
    added: Sequence[torch.Tensor]

    def of(self, place: int, rows: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Rows `[n, K]` from `first` on of the matrix in that place, moved, in float32."""
        rows = rows.float()
        if self.shift is None:
            return rows + self.added[place][first : first + len(rows)]
        return rows + rows @ self.shift


def reduces_error(
    matrices: Sequence[torch.Tensor], found: Correction, drift: Drift, pool: Executor
) -> bool:
    """Whether matrices that are moved come nearer to the results of the source model.

    By the relative squared errors of the tokens in `drift`, which should not be those that the
    correction was found on: some tokens have values a thousand times as large as others. Of large
    matrices the first rows are enough to tell.
    """

    rows = [matrix[:_TESTED_ROWS].float() for matrix in matrices]
    moved = [found.of(place, one) for place, one in enumerate(rows)]

    def errors(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
        source, quantized = (one.reshape(-1, one.shape[-1]) for one in pair)
        before = after = 0.0
        for one, other in zip(rows, moved, strict=True):
            wanted = source @ one.T
            sizes = wanted.square().sum(1).double().clamp_min(1e-30)
            before += float(((wanted - quantized @ one.T).square().sum(1) / sizes).sum())
            after += float(((wanted - quantized @ other.T).square().sum(1) / sizes).sum())
        return before, after

    pairs = list(pool.map(errors, zip(drift.source, drift.quantized, strict=True)))
    return sum(after for _, after in pairs) < sum(before for before, _ in pairs)


def correct(
    matrices: Sequence[torch.Tensor],
    drift: Drift,
    hessian: torch.Tensor,
    strength: float,
    pool: Executor,
) -> Correction | None:
    """The correction of matrices `[N, K]` that multiply the same inputs, which have places in it.

    `hessian` is that of the quantised inputs (its upper half), `strength` (0 to 1) how much of the
    way is gone. None where the regression has no solution in float32.
    """
    import torch

    depth = hessian.shape[0]
    ridged = hessian.clone()
    ridged.diagonal().add_(RIDGE * float(hessian.diagonal().double().mean()))
    lower, info = torch.linalg.cholesky_ex(ridged.T)  # reads the half that is given
    del ridged
    if int(info) != 0 or not bool(torch.isfinite(lower).all()):
        return None
    rows = sum(len(matrix) for matrix in matrices)
    whole = torch.cat([matrix.float() for matrix in matrices]) if rows < depth else None

    def left(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        moved = (pair[0] - pair[1]).reshape(-1, depth).T
        return moved if whole is None else whole @ moved

    # Window after window, as if all were there at once; but so many of them fill no gigabyte.
    found = torch.zeros(depth if whole is None else rows, depth)
    for first in range(0, len(drift.source), _WINDOWS):
        here = slice(first, first + _WINDOWS)
        lefts = list(pool.map(left, zip(drift.source[here], drift.quantized[here], strict=True)))
        add_cross_moments(found, lefts, drift.quantized[here], drift.num_tokens, pool)

    def solve(part: torch.Tensor) -> torch.Tensor:
        return torch.cholesky_solve(part.T, lower).T.mul_(strength)

    for part, solved in zip(found.split(TILE), pool.map(solve, found.split(TILE)), strict=True):
        part.copy_(solved)
    if whole is None:
        return Correction(found, ())
    return Correction(None, found.split([len(matrix) for matrix in matrices]))
