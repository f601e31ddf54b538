"""How far two results are apart: row by row, and as distributions over tokens."""

from __future__ import annotations

import math
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


@dataclass(frozen=True, slots=True)
class Distance:
    """How far a lossy pass moved a model's predictions, in float64 on random tokens.

    `kl` is the mean over `rows` positions of the Kullback-Leibler divergence (in nats) of the
    predictions after the pass from those before it, `top1` the share of positions whose likeliest
    token stayed the same, `error` the largest error of a logit, relative to the largest of its
    row. `what` says what ran: "the whole model", or the layers of a cut one.
    """

    kl: float
    top1: float
    error: float
    rows: int
    what: str

    def text(self) -> str:
        """In one line."""
        return (
            f"KL {self.kl:.3g}, top-1 {100 * self.top1:.1f} %, error {self.error:.3g} "
            f"against the program before it ({self.rows} random tokens, {self.what})"
        )

    def as_data(self) -> dict[str, float | int | str]:
        """As plain data; so many digits as are the same on every machine."""
        return {
            "kl": _rounded(self.kl),
            "top1": _rounded(self.top1),
            "error": _rounded(self.error),
            "rows": self.rows,
            "what": self.what,
        }


def _rounded(number: float) -> float | str:
    """JSON has no infinity: as text."""
    return float(f"{number:.3g}") if math.isfinite(number) else str(number)


def distance(before: torch.Tensor, after: torch.Tensor, what: str) -> Distance:
    """The distance of logits `[R, V]` from those before a pass.

    Logits may be -inf (a token that is never drawn), but neither NaN nor inf.
    """
    import torch

    old, new = before.double().log_softmax(-1), after.double().log_softmax(-1)
    terms = torch.where(old.exp() == 0, 0.0, old.exp() * (old - new))
    kl = float(terms.sum(-1).mean())
    top1 = float((old.argmax(-1) == new.argmax(-1)).double().mean())
    return Distance(max(kl, 0.0), top1, difference(before, after).error, len(before), what)


def difference(
    expected: torch.Tensor, actual: torch.Tensor, *, like_others: bool = False
) -> Difference:
    """The largest error of a row, relative to the largest magnitude in it.

    With `like_others`, no row counts as smaller than the root mean square of all elements. This is
    for rows that differ by chance alone: the sums of a narrow row may all be small, and what
    rounding adds to them does not depend on what they come to.

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
        gap = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)
        finite = a.abs().nan_to_num(nan=0.0, posinf=0.0)
        scale = finite.amax(1).clamp_min(float(finite.max()) * 1e-3).clamp_min(1e-30)
        if like_others:
            scale = scale.clamp_min(float(finite.square().mean().sqrt()))
        errors = gap.amax(1) / scale
    worst = int(errors.argmax())
    error = float(errors[worst])
    bad = int((errors > error / 10).sum()) if error else 0
    return Difference(error, worst, shape[0], bad)
