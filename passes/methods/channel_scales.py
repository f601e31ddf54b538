"""Chooses the scales of channels: SmoothQuant and AWQ, tested on windows that were left out.

SmoothQuant (Xiao et al. 2022, https://arxiv.org/abs/2211.10438) divides each channel of the rows by
`max|x|^a / max|w|^(1-a)`, so that outliers of activations become larger weights. AWQ (Lin et al.
2023, https://arxiv.org/abs/2306.00978) divides by `mean|x|^a`, so that the weights which meet large
activations are rounded with a smaller error, and searches `a` for the least error of the products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ...ir.ops.quantized import quantize_rows_meaning
from ...ir.schemes import AUTO, Activations, Quantizer, Scheme

if TYPE_CHECKING:
    import torch

NONE: Final = "none"
SMOOTHQUANT: Final = "smoothquant"
AWQ: Final = "awq"
SCALINGS: Final = (AUTO, NONE, SMOOTHQUANT, AWQ)
AWQ_EXPONENTS: Final = tuple(step / 10 for step in range(1, 11))
SMOOTHQUANT_EXPONENT: Final = 0.5
_MOST_EXPONENT: Final = 10
"""Scales lie between 2^-10 and 2^10."""
_LEAST_SHARE: Final = 1e-4
"""Statistics below this share of their mean count as this share: such channels hold nothing."""
_TESTED_TOKENS: Final = 512
_TESTED_ROWS: Final = 512
"""Of all matrices together, and of the windows: enough to compare a few scalings."""


@dataclass(frozen=True, slots=True)
class Matrices:
    """Rows `[n, K]` in float32 of the quantised matrices of a group, with their schemes."""

    rows: Sequence[torch.Tensor]
    schemes: Sequence[Scheme]
    quantizers: Mapping[str, Quantizer]


@dataclass(frozen=True, slots=True)
class Windows:
    """Rows `[.., K]` of windows that scales are chosen on, and of those that they are tested on."""

    fitted: Sequence[torch.Tensor]
    held: Sequence[torch.Tensor]


@dataclass(frozen=True, slots=True)
class Choice:
    """Scales `[K]` (whole powers of two) by an exponent, and the errors on windows left out.

    `scales` is None where no scaling lowers the error.
    """

    scales: torch.Tensor | None
    exponent: float
    plain_error: float
    scaled_error: float


def sampled(matrix: torch.Tensor, share: int) -> torch.Tensor:
    """At most `_TESTED_ROWS / share` rows of a matrix `[.., N, K]`, evenly spaced, in float32."""
    import torch

    rows = matrix.reshape(-1, matrix.shape[-1])
    most = min(len(rows), max(32, _TESTED_ROWS // share))
    return rows[torch.arange(most) * len(rows) // most].float()


def scale_logs(
    method: str, exponent: float, fitted: Sequence[torch.Tensor], largest: torch.Tensor
) -> dict[float, torch.Tensor]:
    """Logarithms to base 2 of scales `[K]` by exponent, for rows of windows `[.., K]`.

    `largest` `[K]` is the largest magnitude in each column of all matrices; `exponent` is that of
    SmoothQuant.
    """
    if method == SMOOTHQUANT:
        logs = exponent * _share_logs(_largest(fitted)) - (1 - exponent) * _share_logs(largest)
        return {exponent: logs}
    mean = _share_logs(_mean(fitted))
    return {each: each * mean for each in AWQ_EXPONENTS}


def choose_scales(
    logs: Mapping[float, torch.Tensor],
    matrices: Matrices,
    classes: torch.Tensor,
    windows: Windows,
    pool: Executor,
) -> Choice:
    """The scales of one group: the best on some windows, if they lower the error on the others.

    `logs` are those of `scale_logs`; channels with the same number in `classes` `[K]` get the same
    scale.
    """
    scales = {exponent: _powers_of_two(one, classes) for exponent, one in logs.items()}
    best, *others = scales
    if others:
        errors = pool.map(_Probe(matrices, windows.fitted).error, scales.values())
        best = min(zip(errors, scales, strict=True))[1]
    plain, scaled = pool.map(_Probe(matrices, windows.held).error, (None, scales[best]))
    return Choice(scales[best] if scaled < plain else None, best, plain, scaled)


class _Probe:
    """Some rows of windows, and what the exact products make of them."""

    def __init__(self, matrices: Matrices, windows: Sequence[torch.Tensor]) -> None:
        self.matrices = matrices
        self.x = _some_rows(windows)
        self.wanted = [self.x @ rows.T for rows in matrices.rows]

    def error(self, scales: torch.Tensor | None) -> float:
        """The mean relative squared error of quantised products, with rows rounded too.

        Relative to the result of each token, since some have values a thousand times as large as
        others.
        """
        x = self.x if scales is None else self.x / scales
        inputs = {how: _rounded(x, how) for how in {s.activations for s in self._schemes}}
        total = 0.0
        for rows, scheme, wanted in zip(
            self.matrices.rows, self._schemes, self.wanted, strict=True
        ):
            quantize = self.matrices.quantizers.get(scheme.name, scheme.quantize)
            codes, row_scales = quantize(rows if scales is None else (rows * scales).contiguous())
            weights = scheme.weight.decode(codes, row_scales, rows.shape[-1])
            wrong = (inputs[scheme.activations] @ weights.T - wanted).square().sum(1)
            sizes = wanted.square().sum(1).double().clamp_min(1e-30)
            total += float((wrong / sizes).mean())
        return total / len(self.wanted)

    @property
    def _schemes(self) -> Sequence[Scheme]:
        return self.matrices.schemes


def _rounded(x: torch.Tensor, how: Activations | None) -> torch.Tensor:
    """Rows as their codes have them, or as they are."""
    if how is None:
        return x
    codes, scales = quantize_rows_meaning(x, how.group, how.codes.name)
    return how.codes.decode(codes, scales, how.group, scales.dtype)


def _some_rows(windows: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in windows])
    # A step that divides the length of windows would take the same few positions of each.
    return rows[:: max(1, -(-len(rows) // _TESTED_TOKENS)) | 1].float()


def _largest(windows: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.stack([x.reshape(-1, x.shape[-1]).abs().amax(0) for x in windows]).amax(0)


def _mean(windows: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    sums = [x.reshape(-1, x.shape[-1]).abs().double().sum(0) for x in windows]
    return (torch.stack(sums).sum(0) / sum(x.numel() // x.shape[-1] for x in windows)).float()


def _share_logs(statistic: torch.Tensor) -> torch.Tensor:
    """Logarithms to base 2 of a statistic of each channel, relative to their mean."""
    mean = statistic.mean().clamp_min(1e-30)
    return (statistic / mean).clamp_min(_LEAST_SHARE).log2()


def _powers_of_two(logs: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """The nearest powers of two, one for each class, around 1.

    Multiplying by them is exact, so that the program computes the same bits, and matrices of 16
    bits stay that.
    """
    import torch

    _, index = classes.unique(return_inverse=True)
    sums = torch.zeros(int(index.max()) + 1, dtype=torch.float64).index_add_(
        0, index, logs.double()
    )
    means = (sums / torch.bincount(index))[index]
    whole = (means - means.mean()).round().clamp(-_MOST_EXPONENT, _MOST_EXPONENT)
    return torch.exp2(whole).float()
