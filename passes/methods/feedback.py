"""GPTQ: rounds a matrix a column at a time, and lets later columns make up for each error.

Frantar et al. 2022 (https://arxiv.org/abs/2210.17323), in the form of Chee et al. 2023 (QuIP, LDLQ,
https://arxiv.org/abs/2307.13304): the same numbers from a factor of the Hessian itself rather than
of its inverse, in half of the work. Columns are taken in their order (act-order off).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from ...ir.block_rounding import BlockRounding
from ...ir.errors import PassError
from ...ir.schemes import Scheme
from .grids import Grid

if TYPE_CHECKING:
    import torch

    from ...ir.schemes import FeedbackCode, Quantizer
    from .grids import Parameters

BLOCK: Final = 128
"""Columns that are brought up to date together."""
ROWS: Final = 1024
"""Rows at a time. Fixed, since a product's rounding may depend on its shape."""
_STRONGER: Final = 10.0
_MOST_DAMPING: Final = 100.0


@dataclass(frozen=True, slots=True)
class Factor:
    """`H + damping = M diag(d) M.T`, with `M` `[K, K]` unit upper triangular and `d` `[K]`.

    `added` `[K]` is what was added to the diagonal, `damping` its share of the diagonal's mean,
    `dead` how many columns no input ever reached.
    """

    upper: torch.Tensor
    d: torch.Tensor
    added: torch.Tensor
    damping: float
    dead: int


def factorize(hessian: torch.Tensor, damping: float) -> Factor:
    """The factor of `[K, K]` (float32, symmetric: only its upper half is read).

    A column that no input reached is alone: it is rounded to nearest, and takes nobody's error.
    Where rounding has left the matrix without a factor, more is added. PassError for NaN or
    infinity, and where nothing helps.
    """
    import torch

    diagonal = hessian.diagonal().clone()
    if not torch.isfinite(diagonal).all():
        raise PassError("its inputs on the calibration text hold NaN or infinity")
    dead = diagonal == 0
    mean = float(diagonal.double().sum()) / max(1, int((~dead).sum())) or 1.0
    while True:
        added = torch.full_like(diagonal, damping * mean) + dead * mean
        # The lower factor of the matrix turned around is the upper one of the matrix itself.
        turned = hessian.flip(0, 1)
        turned.diagonal().add_(added.flip(0))
        lower, info = torch.linalg.cholesky_ex(turned)
        del turned
        d = lower.diagonal().square().flip(0)
        if int(info) == 0 and bool(torch.isfinite(d).all()) and bool((d > 0).all()):
            upper = lower.flip(0, 1).contiguous()  # row by row, for compiled code
            upper /= upper.diagonal().clone()
            return Factor(upper, d, added, damping, int(dead.sum()))
        if damping >= _MOST_DAMPING:
            raise PassError(f"its Hessian has no Cholesky factor, even with damping {damping:g}")
        damping = max(damping, 1e-4) * _STRONGER


@dataclass(frozen=True, slots=True)
class Rounded:
    """Some rows in a format: its parts, and what they stand for.

    `error`, `nearest` and `size` are squared norms over the inputs that made the Hessian: of the
    rows' error, of that of rounding to nearest (the method that lost is not in the parts), and of
    the exact results.
    """

    parts: dict[str, torch.Tensor]
    values: torch.Tensor
    error: float
    nearest: float
    size: float

    def without_values(self) -> Rounded:
        """The same, but for what the parts say anyway."""
        return replace(self, values=self.values[:0])


def feed_back(rows: torch.Tensor, factor: Factor, grid: Grid) -> Rounded:
    """Rows `[N, K]` rounded so that their products with the Hessian's inputs are near.

    Never worse than rounding them to nearest, which is taken where it has the lower error (so it
    can be where few inputs are nearly alike).
    """
    weight = rows.T.contiguous().float()
    state = grid.start(rows.float())
    plain = _round(weight, state, grid, None)
    fed = _round(weight, state, grid, factor)
    size, nearest = _norms([weight, weight - plain.values], factor)
    error = _without_damping(fed.error, weight - fed.values, factor)
    better = fed if error <= nearest else plain
    parts = grid.pack(state, better.groups, better.codes)
    return Rounded(parts, better.values.T, min(error, nearest), nearest, size)


@dataclass(frozen=True, slots=True)
class CompiledFeedback:
    """How a scheme is rounded to in compiled code: each weight by itself, and with feedback."""

    scheme: Scheme
    nearest: Quantizer
    fed: FeedbackCode

    def feed_back(self, rows: torch.Tensor, factor: Factor) -> Rounded | None:
        """As the function of that name, in a fraction of the time; None where there is no code.

        Sums may differ in their last bits.
        """
        rows, form = rows.float().contiguous(), self.scheme.weight
        scales = BlockRounding(form).start(rows)
        fed = self.fed(rows, scales, factor.upper, factor.d)
        if fed is None:
            return None
        codes, norms = fed
        made = [self.nearest(rows), (codes, scales)]
        values = [form.decode(*one, rows.shape[1]) for one in made]
        nearest, size = _norms([(rows - values[0]).T, rows.T], factor)
        error = _without_damping(float(norms.sum()), (rows - values[1]).T, factor)
        better = int(error <= nearest)
        parts = dict(zip(("codes", "scales"), made[better], strict=True))
        return Rounded(parts, values[better], min(error, nearest), nearest, size)


@dataclass(frozen=True, slots=True)
class _Columns:
    """Codes (int16) and values of columns `[K, N]`, and the parameters of their groups.

    `error` is the squared norm of what feedback left over, damping included.
    """

    codes: torch.Tensor
    values: torch.Tensor
    groups: Sequence[Parameters]
    error: float


def _round(weight: torch.Tensor, state: Parameters, grid: Grid, factor: Factor | None) -> _Columns:
    """Columns `[K, N]` in their order, each with the errors of those before it where there is a
    factor: `w[k] + sum over j < k of (w[j] - q[j]) M[j, k]` is what becomes `q[k]`."""
    import torch

    depth = weight.shape[0]
    size = grid.group or depth
    block = size * max(1, BLOCK // size) if grid.group else BLOCK
    codes = torch.empty(weight.shape, dtype=torch.int16)
    values = torch.empty_like(weight)
    errors = torch.empty_like(weight)
    groups: list[Parameters] = []
    left = 0.0
    if not grid.group:
        groups.append(grid.fit(weight, state, None if factor is None else factor.d))
    for first in range(0, depth, block):
        last = min(first + block, depth)
        wanted = weight[first:last]
        if factor is not None:
            wanted = wanted.clone()
            wanted.addmm_(factor.upper[:first, first:last].T, errors[:first])
        step = 1 if factor is not None else size
        for column in range(first, last, step):
            end = min(column + step, last)
            here = wanted[column - first : end - first]
            if grid.group and column % grid.group == 0:
                group_end = min(column + grid.group, last)
                group = wanted[column - first : group_end - first]
                if factor is not None:
                    group = _expected(weight[column:group_end], group, factor, column)
                importance = None if factor is None else factor.d[column:group_end]
                groups.append(grid.fit(group, state, importance))
            codes[column:end], values[column:end] = grid.round(here, state, groups[-1])
            if factor is not None:
                torch.sub(weight[column], values[column], out=errors[column])
                later = wanted[end - first :]
                later.addr_(factor.upper[column, end:last], errors[column])
        if factor is not None:
            rest = wanted.sub_(values[first:last]).double().square_().sum(1)
            left += float((rest * factor.d[first:last]).sum())
    return _Columns(codes, values, groups, left)


def _expected(
    weight: torch.Tensor, wanted: torch.Tensor, factor: Factor, first: int
) -> torch.Tensor:
    """What a group's columns will be when their turn comes, if its own are rounded without error.

    `wanted` has the errors of all columns before the group. A column that follows it exactly
    differs from its weight by as much, and so passes on a part of that, with the other sign.
    """
    import torch

    last = first + weight.shape[0]
    inner = factor.upper[first:last, first:last].T
    moved = wanted - weight
    solved: torch.Tensor = torch.linalg.solve_triangular(
        inner, moved, upper=False, unitriangular=True
    )
    return weight + solved


def _norms(columns: Sequence[torch.Tensor], factor: Factor) -> list[float]:
    """The squared norm of each (`[K, N]`) over the inputs: the trace of `E.T H E`."""
    import torch

    depth, rows = columns[0].shape
    both = torch.cat(list(columns), 1)
    # Squares of large weights exceed float32; a power of two changes no bit of the others.
    unit = _power_of_two(both)
    both = both / unit
    total = torch.zeros(len(columns), dtype=torch.float64)
    for first in range(0, depth, BLOCK):
        last = min(first + BLOCK, depth)
        part = factor.upper[:last, first:last].T @ both[:last]
        each = part.square_().view(last - first, -1, rows).sum(2, dtype=torch.float64)
        total += factor.d[first:last].double() @ each
    return [
        _without_damping(float(norm) * unit * unit, one, factor)
        for norm, one in zip(total, columns, strict=True)
    ]


def _power_of_two(values: torch.Tensor) -> float:
    """The power of two below the largest magnitude; 1 for zeros."""
    largest = float(values.abs().max()) if values.numel() else 0.0
    return math.ldexp(1.0, math.frexp(largest)[1] - 1) if largest > 0 else 1.0


def _without_damping(norm: float, columns: torch.Tensor, factor: Factor) -> float:
    """The squared norm of columns `[K, N]` over the inputs alone, from that with what was added."""
    squares = columns.double().square_().sum(1)
    return max(0.0, norm - float((squares * factor.added.double()).sum()))
