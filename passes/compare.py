"""How far two results are apart, row by row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two tensors are apart: the worst row, and how many rows are as bad as a tenth."""

    error: float
    row: int
    rows: int
    bad_rows: int


def difference(expected: torch.Tensor, actual: torch.Tensor) -> Difference:
    """The largest error of a row, relative to the largest magnitude in it.

    Rows count along the first dimension that is not 1. Where one side has NaN and the other has
    not, or infinities differ, the error is infinite. Whole numbers must be equal.
    """
    import torch

    shape = [size for size in expected.shape if size != 1] or [1]
    if torch.equal(expected, actual):
        return Difference(0.0, 0, shape[0], 0)
    a, b = (t.reshape(shape[0], -1) for t in (expected, actual))
    if a.numel() == 0:
        return Difference(0.0, 0, shape[0], 0)
    if not a.is_floating_point():
        errors = (a != b).any(1).double()
    else:
        a, b = a.double(), b.double()
        same = (a == b) | (a.isnan() & b.isnan())
        gap = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf)
        finite = a.abs().nan_to_num(nan=0.0, posinf=0.0)
        scale = finite.amax(1).clamp_min(float(finite.max()) * 1e-3).clamp_min(1e-30)
        errors = gap.amax(1) / scale
    worst = int(errors.argmax())
    error = float(errors[worst])
    bad = int((errors > error / 10).sum()) if error else 0
    return Difference(error, worst, shape[0], bad)
