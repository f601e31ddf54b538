"""Quantization schemes: a format of weights, what multiplies it, and how products are summed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .block_rounding import BlockRounding
from .errors import ProgramError
from .formats import B4_G32, GROUP, I4_G32, I8, I8_G32, Q4_0, Q4_1, Q8_0, Format
from .rounding import quantize_i4, quantize_i8

if TYPE_CHECKING:
    import torch

Quantizer = Callable[["torch.Tensor"], tuple["torch.Tensor", "torch.Tensor"]]
"""Makes the codes and row scales of a matrix `[.., N, K]`."""

MAX_EXACT_DEPTH: Final = 65536
"""The number of products that one int32 sum can hold, even if one side is shifted to 0 .. 255.

The limit of rows of exact schemes. With groups, an integer sum has `GROUP` products.
"""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How `scaled_linear` and `scaled_moe` store a matrix `[N, K]`, and what multiplies it.

    Rows of activations are quantized to int8 when they are computed (`quantize_rows`), with a
    float32 scale for each `row_group` elements of K, or one for the whole row if it is 0. With one
    scale for each row, products are integer sums, which are exact in any order. With groups, the
    exact sum of each group is multiplied by its scales, and the results are added in float32 in
    ascending order of K. `quantize` rounds a matrix to nearest. `tolerance` is the allowed error of
    a product of random rows, relative to the largest result of a row.
    """

    name: str
    weight: Format
    row_group: int
    quantize: Quantizer
    tolerance: float
    doc: str = ""

    @property
    def is_exact(self) -> bool:
        """Whether products are sums of integers."""
        return self.row_group == 0


_ROWS: Final = "; int8 activations with a scale for each group of 32"
_TOKENS: Final = "; int8 activations with one scale per token, and exact integer sums"


def _grouped(name: str, weight: Format, tolerance: float) -> Scheme:
    return Scheme(
        name, weight, GROUP, BlockRounding(weight).encode, tolerance, doc=weight.doc + _ROWS
    )


INT8: Final = _grouped("int8", I8_G32, 0.02)
INT4: Final = _grouped("int4", B4_G32, 0.25)
INT8_TOKEN: Final = Scheme("int8-token", I8, 0, quantize_i8, 0.05, doc=I8.doc + _TOKENS)
INT4_TOKEN: Final = Scheme("int4-token", I4_G32, 0, quantize_i4, 0.35, doc=I4_G32.doc + _TOKENS)
SCHEMES: Final = {
    scheme.name: scheme
    for scheme in (
        INT8,
        INT4,
        INT8_TOKEN,
        INT4_TOKEN,
        _grouped("q8_0", Q8_0, 0.02),
        _grouped("q4_0", Q4_0, 0.35),
        _grouped("q4_1", Q4_1, 0.3),
    )
}
"""Every scheme by name."""

NONE: Final = "none"
"""The name of no scheme: a matrix stays as it is."""
AUTO: Final = "auto"
"""The name of a choice that follows from others."""
ADOPT: Final = "adopt"
"""The name of the schemes in which a file holds its matrices already."""


def is_quantizing(*names: str) -> bool:
    """Whether any of these choices of schemes may quantize a matrix.

    `NONE`, `AUTO` and an empty name do not by themselves; every other name counts, also a
    misspelt one, which would otherwise be ignored instead of refused.
    """
    return any(name not in ("", NONE, AUTO) for name in names)


def get_scheme(name: object) -> Scheme:
    """The scheme of that name; ProgramError if there is none."""
    if not isinstance(name, str) or name not in SCHEMES:
        raise ProgramError(f"unknown scheme {name!r}", hint=f"known: {', '.join(SCHEMES)}")
    return SCHEMES[name]
