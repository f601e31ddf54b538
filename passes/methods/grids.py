"""What error feedback needs to know of a format: how values become codes, a column at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from ...ir.block_rounding import BlockRounding, GroupScales
from ...ir.e4m3 import decode_e4m3, e4m3_scales, encode_e4m3
from ...ir.formats import Format
from ...ir.rounding import (
    GROUP_I4,
    GROUP_I4_BYTES,
    LARGEST_I8,
    LOWEST_I4,
    MOST_MULTIPLIER,
    TINY,
    best_multipliers,
    pack_i4,
)
from ...ir.schemes import SCHEMES

if TYPE_CHECKING:
    import torch

    Parameters = tuple[torch.Tensor, ...]


class Grid(Protocol):
    """Rounds a matrix `[N, K]` to a format, one column of N values after the other.

    Matrices are transposed here, `[K, N]`: a column is contiguous, and what a row (or its group of
    `group` columns) shares broadcasts against any number of columns. All is float32.
    """

    @property
    def group(self) -> int:
        """Columns that share parameters beside those of their row; 0 where there are none."""
        ...

    def start(self, rows: torch.Tensor) -> Parameters:
        """What each row of `[N, K]` shares, each tensor `[N]`: its scale, for instance."""
        ...

    def fit(
        self, values: torch.Tensor, row: Parameters, importance: torch.Tensor | None
    ) -> Parameters:
        """What a group of columns `[G, N]` shares (G <= `group`), each tensor `[N]`.

        `importance` `[G]` weighs the squared errors of columns; None: all the same.
        """
        ...

    def round(
        self, values: torch.Tensor, row: Parameters, group: Parameters
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (whole numbers in float32) and the values they stand for, of `[.., N]`."""
        ...

    def pack(
        self, row: Parameters, groups: Sequence[Parameters], codes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The format's parts by name, each with N first, of all codes `[K, N]` (int16)."""
        ...


class Int8Grid:
    """int8 codes, one scale a row; see `quantize_i8`."""

    group = 0

    def start(self, rows: torch.Tensor) -> Parameters:
        """The scale and its inverse."""
        import torch

        top = rows.abs().amax(-1)
        used = top >= TINY
        inverse = torch.where(used, torch.tensor(float(LARGEST_I8)) / top.clamp_min(TINY), 0.0)
        return torch.where(used, top / LARGEST_I8, 0.0), inverse

    def fit(
        self, values: torch.Tensor, row: Parameters, importance: torch.Tensor | None
    ) -> Parameters:
        """Nothing."""
        return ()

    def round(
        self, values: torch.Tensor, row: Parameters, group: Parameters
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """To nearest, ties to even."""
        scale, inverse = row
        codes = (values * inverse).round_().clamp_(-LARGEST_I8, LARGEST_I8)
        return codes, codes * scale

    def pack(
        self, row: Parameters, groups: Sequence[Parameters], codes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Codes `[N, K]` and scales `[N]`."""
        import torch

        return {"codes": codes.T.to(torch.int8).contiguous(), "scales": row[0]}


class E4m3Grid:
    """e4m3, one scale a row; see `quantize_e4m3`."""

    group = 0

    def start(self, rows: torch.Tensor) -> Parameters:
        """The scale and its inverse."""
        return e4m3_scales(rows.abs().amax(-1))

    def fit(
        self, values: torch.Tensor, row: Parameters, importance: torch.Tensor | None
    ) -> Parameters:
        """Nothing."""
        return ()

    def round(
        self, values: torch.Tensor, row: Parameters, group: Parameters
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """To nearest, ties to even."""
        scale, inverse = row
        codes = encode_e4m3(values * inverse)
        return codes.float(), decode_e4m3(codes).mul_(scale)

    def pack(
        self, row: Parameters, groups: Sequence[Parameters], codes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Codes `[N, K]` and scales `[N]`."""
        import torch

        return {"codes": codes.T.to(torch.uint8).contiguous(), "scales": row[0]}


class Int4Grid:
    """4-bit codes, a whole multiplier a group of 32, one scale a row; see `quantize_i4`."""

    group = GROUP_I4

    def start(self, rows: torch.Tensor) -> Parameters:
        """The scale and its inverse."""
        import torch

        largest = -LOWEST_I4 * MOST_MULTIPLIER
        scale = rows.abs().amax(-1) / largest
        scale = torch.where(scale * largest < TINY, 0.0, scale)
        return scale, torch.where(scale == 0, 0.0, 1 / scale.clamp_min(TINY))

    def fit(
        self, values: torch.Tensor, row: Parameters, importance: torch.Tensor | None
    ) -> Parameters:
        """The multiplier: as the scheme rounds, or of some around it the least weighted error."""
        import torch

        missing = GROUP_I4 - values.shape[0]
        units = torch.nn.functional.pad((values * row[1]).T, (0, missing))
        if importance is None:
            return (best_multipliers(units).squeeze(-1),)
        weights = torch.nn.functional.pad(importance / importance.mean(), (0, missing))
        return (_weighted_multipliers(units, weights),)

    def round(
        self, values: torch.Tensor, row: Parameters, group: Parameters
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """To the nearest code."""
        (scale, inverse), (multiplier,) = row, group
        codes = (values * inverse).div_(multiplier).round_().clamp_(LOWEST_I4, -LOWEST_I4 - 1)
        return codes, (codes * multiplier).mul_(scale)

    def pack(
        self, row: Parameters, groups: Sequence[Parameters], codes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Bytes of groups `[N, groups * 17]` and scales `[N]`."""
        import torch

        depth, rows = codes.shape
        padded = torch.nn.functional.pad(codes.T.float(), (0, len(groups) * GROUP_I4 - depth))
        multipliers = torch.stack([multiplier for (multiplier,) in groups], -1)
        packed = pack_i4(padded.reshape(-1, GROUP_I4), multipliers.reshape(-1, 1))
        return {"codes": packed.reshape(rows, len(groups) * GROUP_I4_BYTES), "scales": row[0]}


_STEPS: Final = (0, -1, 1, -2)
"""Multipliers that are tried beside the one that the largest value of a group needs; of columns
that count for little, large values may be cut off."""


def _weighted_multipliers(units: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The multiplier `[N]` of each group `[N, 32]` by its squared error under `weights` `[32]`."""
    import torch

    top = units.gather(-1, units.abs().argmax(-1, keepdim=True))
    nearest = (top.abs() / -LOWEST_I4).round_()
    sign = torch.where(top > 0, -1.0, 1.0)
    tried = [
        side * sign * (nearest + step).clamp(1, MOST_MULTIPLIER)
        for side in (1, -1)
        for step in _STEPS
    ]
    errors = []
    for multiplier in tried:
        wrong = (units / multiplier).round_().clamp_(LOWEST_I4, -LOWEST_I4 - 1)
        errors.append(wrong.mul_(multiplier).sub_(units).square_() @ weights)
    best = torch.stack(errors).argmin(0, keepdim=True)
    return torch.stack(tried).squeeze(-1).gather(0, best).squeeze(0)


class BlockGrid:
    """A grouped format, with what `BlockRounding` rounds it by."""

    def __init__(self, form: Format) -> None:
        self.rounding = BlockRounding(form)

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.rounding.format.group

    def start(self, rows: torch.Tensor) -> Parameters:
        """The scale and its inverse."""
        import torch

        scale = self.rounding.start(rows)
        return scale, torch.where(scale == 0, 0.0, 1 / torch.where(scale == 0, 1.0, scale))

    def fit(
        self, values: torch.Tensor, row: Parameters, importance: torch.Tensor | None
    ) -> Parameters:
        """The scale of the group, and its minimum if the format has one."""
        import torch

        missing = self.group - values.shape[0]
        units = torch.nn.functional.pad((values * row[1]).T, (0, missing))
        weights = None
        if importance is not None and bool(importance.any()):
            weights = torch.nn.functional.pad(importance / importance.mean(), (0, missing))
        found = self.rounding.fit(units, weights)
        parts = (found.scale, found.minimum)
        return tuple(one.squeeze(-1) for one in parts if one is not None)

    def round(
        self, values: torch.Tensor, row: Parameters, group: Parameters
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """To the nearest code."""
        scales = GroupScales(*group)
        codes = self.rounding.codes(values * row[1], scales)
        return codes.float(), self.rounding.values(codes, scales).mul_(row[0])

    def pack(
        self, row: Parameters, groups: Sequence[Parameters], codes: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Blocks `[N, groups * block_bytes]` and scales `[N]`."""
        import torch

        depth, rows = codes.shape
        padded = torch.nn.functional.pad(codes.T, (0, len(groups) * self.group - depth))
        kind = torch.int8 if self.rounding.format.bits == 8 else torch.uint8
        scales = (torch.stack(parts, -1).reshape(-1, 1) for parts in zip(*groups, strict=True))
        packed = self.rounding.pack(padded.to(kind).reshape(-1, self.group), GroupScales(*scales))
        return {"codes": packed.reshape(rows, -1), "scales": row[0]}


GRIDS: Final[Mapping[str, Grid]] = {
    "int8-token": Int8Grid(),
    "int4-token": Int4Grid(),
    "fp8": E4m3Grid(),
    "fp8-weights": E4m3Grid(),
    **{
        name: BlockGrid(scheme.weight)
        for name, scheme in SCHEMES.items()
        if scheme.weight.is_grouped and not scheme.is_exact
    },
}
"""The grid of each scheme that feedback can round to."""
