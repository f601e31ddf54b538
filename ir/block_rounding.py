"""How the weights of grouped formats are rounded to the nearest of their values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Final

from .errors import UsageError
from .formats import CHUNK, Format
from .rounding import LARGEST_I8, TINY
from .types import DType

if TYPE_CHECKING:
    import torch

FACTORS: Final = (1.0, 1.0625, 1.125, 0.9375, 0.875, 0.8125)
"""Multiples that are tried of the scale that the largest weight of a group needs."""
MOST_FACTOR: Final = max(FACTORS)
_RANGE_FACTORS: Final = (1.0, 0.9, 0.8)
_PART: Final = 1 << 18
"""Weights at a time: what is made of them on the way stays in the caches."""
_MAX_HALF: Final = 65504


@dataclass(frozen=True, slots=True)
class GroupScales:
    """The scales of R groups, and their minima if the format has them, `[R, 1]` in float32.

    They are the values that the format stores, so codes are chosen after they have been rounded.
    """

    scale: torch.Tensor
    minimum: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class BlockRounding:
    """Rounds to a grouped format. Weights are given in units of the scale of their row.

    All operations are in float32 and in a fixed order, so that compiled code can give the same
    bits. Passes that choose codes in another way (such as error feedback) use the same steps:
    `start`, then for each group `fit`, `codes` and `values`, and `pack` at the end.
    """

    format: Format

    def start(self, matrix: torch.Tensor) -> torch.Tensor:
        """The row scales `[.., N]` of a matrix `[.., N, K]`; 0 for a row below `TINY`.

        With multipliers, the largest is enough for the largest weight of the row and every factor
        that may be tried on it. Formats with float16 scales have row scales of 1.
        """
        import torch

        if not matrix.shape[-1]:
            top = torch.zeros(matrix.shape[:-1])
        else:
            top = matrix.float().abs().amax(-1)
        if self.format.scale is not DType.I8:
            # A row that is not finite must show in its scale.
            return torch.where(torch.isfinite(top), 1.0, torch.nan)
        room = 1.0 if self.format.bits == 8 else MOST_FACTOR
        scale = top * (room / (_top_level(self.format) * LARGEST_I8))
        return torch.where(top < TINY, 0.0, scale)

    def units(self, matrix: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """A matrix `[.., N, K]` in float32, divided by its row scales; zeros where these are 0."""
        import torch

        inverse = torch.where(scales == 0, 0.0, 1 / torch.where(scales == 0, 1.0, scales))
        return matrix.float() * inverse[..., None]

    def fit(self, units: torch.Tensor, importance: torch.Tensor | None = None) -> GroupScales:
        """Scales for groups `[R, n]` (n at most `group`), those with the smallest squared error.

        `importance` `[n]` or `[R, n]` weights the errors. The first of equal scales is taken.
        """
        if self.format.minimum is not None:
            return self._fit_range(units, importance)
        top = units.abs().amax(-1, keepdim=True)
        if self.format.bits == 8:
            needed = top * (1 / LARGEST_I8)
            return GroupScales(self._stored(needed.ceil() if self._is_whole else needed))
        return self._fit_levels(units, top, importance)

    @property
    def _is_whole(self) -> bool:
        return self.format.scale is DType.I8

    def _stored(self, scale: torch.Tensor) -> torch.Tensor:
        """The nearest scale that the format stores."""
        if not self._is_whole:
            return scale.half().float()
        return scale.round().abs().clamp(1, LARGEST_I8).copysign(scale)

    def _fit_levels(
        self, units: torch.Tensor, top: torch.Tensor, importance: torch.Tensor | None
    ) -> GroupScales:
        import torch

        needed = top * (1 / _top_level(self.format))
        best = error = None
        for factor in FACTORS:
            for sign in (1, -1):
                tried = GroupScales(self._stored(needed * (sign * factor)))
                wrong = self._squared_error(units, tried, importance)
                if best is None or error is None:
                    best, error = tried.scale, wrong
                else:
                    best = torch.where(wrong < error, tried.scale, best)
                    error = torch.minimum(wrong, error)
        assert best is not None
        return GroupScales(best)

    def _fit_range(self, units: torch.Tensor, importance: torch.Tensor | None) -> GroupScales:
        import torch

        low = units.amin(-1, keepdim=True).clamp_max(0)
        high = units.amax(-1, keepdim=True).clamp_min(0)
        best: GroupScales | None = None
        error = None
        for below in _RANGE_FACTORS:
            minimum = (low * below).half().float()
            for above in _RANGE_FACTORS:
                scale = ((high * above - minimum) * (1 / 15)).half().float()
                tried = GroupScales(scale, minimum)
                wrong = self._squared_error(units, tried, importance)
                if best is None or best.minimum is None or error is None:
                    best, error = tried, wrong
                else:
                    better = wrong < error
                    best = GroupScales(
                        torch.where(better, scale, best.scale),
                        torch.where(better, minimum, best.minimum),
                    )
                    error = torch.minimum(wrong, error)
        assert best is not None
        return best

    def _squared_error(
        self, units: torch.Tensor, scales: GroupScales, importance: torch.Tensor | None
    ) -> torch.Tensor:
        """`[R, 1]`; halves are added to each other, so that the order of the sum is known."""
        import torch

        wrong = (self.values(self.codes(units, scales), scales) - units).square()
        if importance is not None:
            wrong = wrong * importance
        half = self.format.group
        if wrong.shape[-1] < half:
            wrong = torch.nn.functional.pad(wrong, (0, half - wrong.shape[-1]))
        while half := half // 2:
            wrong = wrong[:, :half] + wrong[:, half:]
        return wrong

    def codes(self, units: torch.Tensor, scales: GroupScales) -> torch.Tensor:
        """The codes of groups `[R, n]` whose values are nearest: int8, or uint8 from 0 on."""
        import torch

        offset = units if scales.minimum is None else units - scales.minimum
        zero = scales.scale == 0
        inverse = torch.where(zero, 0.0, 1 / torch.where(zero, 1.0, scales.scale))
        wanted = (offset * inverse).round()
        if self.format.bits == 8:
            return wanted.clamp(-LARGEST_I8, LARGEST_I8).to(torch.int8)
        lowest, *_, highest = self.format.levels
        place = wanted.clamp(lowest, highest) - lowest
        if highest - lowest == len(self.format.levels) - 1:
            return place.to(torch.uint8)
        nearest = _table(nearest_levels(self.format.levels), torch.uint8)
        return nearest.take(place.nan_to_num(0).long())

    def values(self, codes: torch.Tensor, scales: GroupScales) -> torch.Tensor:
        """What codes `[R, n]` stand for, in units of the scale of their row."""
        import torch

        levels = codes.float()
        if self.format.bits != 8:
            levels = _table(self.format.levels, torch.float32).take(codes.long())
        values = levels * scales.scale
        return values if scales.minimum is None else values + scales.minimum

    def pack(self, codes: torch.Tensor, scales: GroupScales) -> torch.Tensor:
        """Blocks `[R, block_bytes]` (uint8) of codes `[R, group]` and the scales of the groups."""
        import torch

        kind = torch.int8 if self._is_whole else torch.float16
        stored = [scales.scale, *([] if scales.minimum is None else [scales.minimum])]
        head = [one.to(kind).view(torch.uint8) for one in stored]
        if self.format.bits == 8:
            return torch.cat([*head, codes.view(torch.uint8)], -1)
        if self.format.bits == 6:
            return torch.cat([*head, _pack_six_bits(codes)], -1)
        lower, upper = codes.unflatten(-1, (-1, 2, CHUNK // 2)).unbind(-2)
        return torch.cat([*head, (lower | (upper << 4)).flatten(1)], -1)

    def encode(self, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The codes (uint8) and row scales of a matrix `[.., N, K]`, rounded to nearest.

        UsageError as `check_scales` says it.
        """
        import torch

        scales = self.start(matrix)
        group = self.format.group
        blocks = -(-matrix.shape[-1] // group)
        width = blocks * self.format.block_bytes
        if not matrix.numel():
            return torch.empty((*matrix.shape[:-1], width), dtype=torch.uint8), scales
        units = self.units(matrix, scales)
        padded = torch.nn.functional.pad(units, (0, blocks * group - matrix.shape[-1]))
        made = []
        for part in padded.reshape(-1, group).split(_PART // group):
            fitted = self.fit(part)
            made.append(self.pack(self.codes(part, fitted), fitted))
        codes = torch.cat(made).reshape(*matrix.shape[:-1], width)
        self.check_scales(matrix, codes)
        return codes, scales

    def check_scales(
        self, matrix: torch.Tensor, codes: torch.Tensor, *, where: str | None = None
    ) -> None:
        """UsageError if a matrix `[.., N, K]` is outside of the range of float16 scales.

        This is the case if a scale or minimum in its `codes` `[.., N, width]` is infinite, or if
        all of them are 0 and the matrix is not. Row scales extend the range of other formats.
        """
        import torch

        if self._is_whole or not matrix.numel():
            return
        head = self.format.part("codes").offset
        blocks = codes.reshape(-1, self.format.block_bytes)
        stored = blocks[:, :head].contiguous().view(torch.float16)
        if stored.isinf().any():
            problem = "too large"
        elif not stored.any() and matrix.any():
            problem = "so small that all of it would become 0"
        else:
            return
        top = float(matrix.abs().amax())
        raise UsageError(
            f"its largest magnitude is {top:.3g}, {problem} for {self._range}",
            where=where,
            hint="choose another scheme for this weight with an entry of quantization.rules",
        )

    @property
    def _range(self) -> str:
        """What float16 scales allow, for messages."""
        largest = _top_level(self.format) * _MAX_HALF
        # Half of the smallest subnormal number, 2^-24, is rounded to 0.
        smallest = _top_level(self.format) * 2.0**-25
        if self.format.minimum is None:
            return f"{self.format.name}, which holds about {smallest:.2g} to {largest:.3g}"
        return (
            f"{self.format.name}, where a group holds about {-_MAX_HALF} or more, "
            f"and spans about {smallest:.2g} to {largest:.3g}"
        )


@cache
def _table(numbers: tuple[float, ...], dtype: torch.dtype) -> torch.Tensor:
    """Numbers to look up, made once: error feedback rounds one column at a time."""
    import torch

    return torch.tensor(numbers, dtype=dtype)


def _pack_six_bits(codes: torch.Tensor) -> torch.Tensor:
    """The bytes `[R, ..]` of codes `[R, group]` from 0 to 63."""
    import torch

    quads = codes.unflatten(-1, (-1, 4, 4))
    upper = sum((quads[..., i, :] >> 4) << (2 * i) for i in range(1, 4)) + (quads[..., 0, :] >> 4)
    lower = (quads[..., :2, :] & 15) | (quads[..., 2:, :] << 4)
    return torch.cat([upper, lower.flatten(-2)], -1).flatten(1)


def _top_level(form: Format) -> float:
    return LARGEST_I8 if form.bits == 8 else max(abs(level) for level in form.levels)


@cache
def nearest_levels(levels: tuple[float, ...]) -> tuple[int, ...]:
    """For each whole number from the lowest to the highest level, the code of the nearest one.

    The lower of two levels that are equally near.
    """
    return tuple(
        min(range(len(levels)), key=lambda code: (abs(levels[code] - number), code))
        for number in range(int(levels[0]), int(levels[-1]) + 1)
    )
