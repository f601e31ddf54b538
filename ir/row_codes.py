"""Kinds of codes that rows of activations are quantized to when they are computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .e4m3 import decode_e4m3, quantize_e4m3, quantize_e4m3_groups
from .errors import ProgramError
from .formats import CHUNK, E4M3_B128
from .rounding import quantize_groups_i8, quantize_i8
from .types import DType

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class RowCodes:
    """How numbers of rows become codes of 8 bits, and numbers again.

    `rows` gives codes and scales of rows `[.., K]`, and `groups` those of rows with a scale for
    each so many elements, which are `group` wherever rows have groups. `levels` are the numbers
    that codes stand for, in units of their scale, in a given type.
    """

    name: str
    dtype: DType
    group: int
    rows: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    groups: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]
    levels: Callable[[torch.Tensor, torch.dtype], torch.Tensor]

    def decode(
        self, codes: torch.Tensor, scales: torch.Tensor, group: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Rows `[.., K]` that codes and their scales stand for."""
        levels = self.levels(codes, dtype)
        if not group:
            return levels * scales[..., None]
        return levels * scales.repeat_interleave(group, -1)[..., : codes.shape[-1]]


I8_ROWS: Final = RowCodes(
    "i8", DType.I8, CHUNK, quantize_i8, quantize_groups_i8, lambda codes, dtype: codes.to(dtype)
)
E4M3_ROWS: Final = RowCodes(
    "e4m3", DType.U8, E4M3_B128.tile, quantize_e4m3, quantize_e4m3_groups, decode_e4m3
)
ROW_CODES: Final = {one.name: one for one in (I8_ROWS, E4M3_ROWS)}
"""Every kind by name."""


def get_row_codes(name: object) -> RowCodes:
    """The kind of that name; ProgramError if there is none."""
    if not isinstance(name, str) or name not in ROW_CODES:
        raise ProgramError(f"unknown codes {name!r}", hint=f"known: {', '.join(ROW_CODES)}")
    return ROW_CODES[name]
