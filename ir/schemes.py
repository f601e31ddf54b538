"""Quantization schemes: a format of weights, what multiplies it, and how products are summed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from .block_rounding import BlockRounding
from .e4m3 import E4M3_LEVELS, quantize_e4m3_matrix, quantize_e4m3_rows, quantize_e4m3_tiles
from .errors import ProgramError
from .formats import (
    B4_G32,
    B4_G64,
    B4_G128,
    CHUNK,
    E4M3,
    E4M3_B128,
    I4_G32,
    I6_G32,
    I8,
    I8_G32,
    Q4_0,
    Q4_1,
    Q8_0,
    Format,
)
from .rounding import quantize_i4, quantize_i8
from .row_codes import E4M3_ROWS, I8_ROWS, RowCodes

if TYPE_CHECKING:
    import torch

Quantizer = Callable[["torch.Tensor"], tuple["torch.Tensor", "torch.Tensor"]]
"""Makes the codes and row scales of a matrix `[.., N, K]`."""
FeedbackCode = Callable[
    ["torch.Tensor", "torch.Tensor", "torch.Tensor", "torch.Tensor"],
    "tuple[torch.Tensor, torch.Tensor] | None",
]
"""Makes codes of rows `[N, K]` in float32 by error feedback, from scales `[N]` and a factor of
the Hessian: `[K, K]` and `[K]`; with the squared norm over its inputs of each row's error, `[N]`
in float64. None where it cannot."""

MAX_EXACT_DEPTH: Final = 65536
"""The number of products that one int32 sum can hold, even if one side is shifted to 0 .. 255.

The limit of rows of exact schemes. With groups, an integer sum has `CHUNK` products.
"""


@dataclass(frozen=True, slots=True)
class Activations:
    """How rows of activations are quantized to 8 bits when they are computed (`quantize_rows`).

    There is a float32 scale for each `group` elements of K, or one for the whole row if it is 0.
    """

    group: int
    doc: str
    codes: RowCodes = I8_ROWS


@dataclass(frozen=True, slots=True)
class Scheme:
    """How ops over codes store a matrix `[N, K]`, and what multiplies it.

    `activations` says how rows are quantized; None means that they stay as they are. With one scale
    for each row, products are integer sums, which are exact in any order. With groups, the exact
    sum of each `CHUNK` elements is multiplied by its scales, and the results are added in float32
    in ascending order of K. With rows that stay, everything is in float32: within a chunk, elements
    times levels are added in ascending order of K, and the sum is multiplied by its scale.
    Products of e4m3 are added in float32, in any order: backends differ in the last bits.
    `quantize` rounds a matrix to nearest. `tolerance` is the allowed error of a product of random
    rows, relative to the largest result of a row.
    """

    name: str
    weight: Format
    activations: Activations | None
    quantize: Quantizer
    tolerance: float

    @property
    def doc(self) -> str:
        """The format of the weights, and what multiplies them."""
        rows = "activations stay as they are" if self.activations is None else self.activations.doc
        return f"{self.weight.doc}; {rows}"

    @property
    def is_exact(self) -> bool:
        """Whether products are sums of integers."""
        rows = self.activations
        return rows is not None and rows.group == 0 and rows.codes is I8_ROWS

    @property
    def is_fp8(self) -> bool:
        """Whether weights are floating-point numbers of 8 bits."""
        return self.weight.levels is E4M3_LEVELS


GROUPS: Final = Activations(CHUNK, "int8 activations with a scale for each group of 32")
TOKENS: Final = Activations(0, "int8 activations with one scale per token, and exact integer sums")
E4M3_TOKENS: Final = Activations(0, "e4m3 activations with one scale per token", E4M3_ROWS)
E4M3_GROUPS: Final = Activations(
    E4M3_ROWS.group, "e4m3 activations with a scale for each group of 128", E4M3_ROWS
)


_FP8_TOLERANCE: Final = 0.15
"""A number is off by 1/17 of itself at most, and its square, which a norm makes of a row that was
looked up, by an eighth."""


def _grouped(name: str, weight: Format, tolerance: float) -> Scheme:
    return Scheme(name, weight, GROUPS, BlockRounding(weight).encode, tolerance)


INT8: Final = _grouped("int8", I8_G32, 0.02)
INT6: Final = _grouped("int6", I6_G32, 0.07)
INT4: Final = _grouped("int4", B4_G32, 0.25)
INT8_TOKEN: Final = Scheme("int8-token", I8, TOKENS, quantize_i8, 0.05)
INT4_TOKEN: Final = Scheme("int4-token", I4_G32, TOKENS, quantize_i4, 0.35)
FP8: Final = Scheme("fp8", E4M3, E4M3_TOKENS, quantize_e4m3_rows, _FP8_TOLERANCE)
_FP8: Final = (
    FP8,
    Scheme("fp8-tensor", E4M3, E4M3_TOKENS, quantize_e4m3_matrix, _FP8_TOLERANCE),
    Scheme(
        "fp8-block",
        E4M3_B128,
        E4M3_GROUPS,
        partial(quantize_e4m3_tiles, tile=E4M3_B128.tile),
        _FP8_TOLERANCE,
    ),
)
_GROUPED: Final = (
    INT8,
    INT6,
    INT4,
    _grouped("int4-g64", B4_G64, 0.27),
    _grouped("int4-g128", B4_G128, 0.3),
    _grouped("q8_0", Q8_0, 0.02),
    _grouped("q4_0", Q4_0, 0.35),
    _grouped("q4_1", Q4_1, 0.3),
)


def weights_name(name: str) -> str:
    """The name of the scheme with the same weights and activations that stay as they are."""
    return f"{name}-weights"


_WEIGHTS: Final = tuple(
    replace(scheme, name=weights_name(scheme.name), activations=None)
    for scheme in (*_GROUPED, *_FP8)
)
SCHEMES: Final = {
    scheme.name: scheme for scheme in (*_GROUPED, INT8_TOKEN, INT4_TOKEN, *_FP8, *_WEIGHTS)
}
"""Every scheme by name."""
INT8_WEIGHTS: Final = SCHEMES["int8-weights"]

NONE: Final = "none"
"""The name of no scheme: a matrix stays as it is."""
AUTO: Final = "auto"
"""The name of a choice that follows from others."""
ADOPT: Final = "adopt"
"""The name of the schemes in which a file holds its matrices already: their codes are kept."""
ADOPTING: Final = {ADOPT: INT8, weights_name(ADOPT): INT8_WEIGHTS}
"""Names of such schemes, and what matrices get that the file holds in other formats of few bits."""


def is_quantizing(*names: str) -> bool:
    """Whether any of these choices of schemes may quantize a matrix.

    `NONE`, `AUTO` and an empty name do not by themselves; every other name counts, also a
    misspelt one, which would otherwise be ignored instead of refused.
    """
    return any(name not in ("", NONE, AUTO) for name in names)


def has_four_bits(name: str) -> bool:
    """Whether that is the name of a scheme with weights of 4 bits."""
    return name in SCHEMES and SCHEMES[name].weight.bits == 4


def has_few_bits(name: str) -> bool:
    """Whether that is the name of a scheme with weights of fewer than 8 bits."""
    return name in SCHEMES and SCHEMES[name].weight.bits < 8


def is_fp8(name: str) -> bool:
    """Whether that is the name of a scheme whose weights are floating-point numbers of 8 bits."""
    return name in SCHEMES and SCHEMES[name].is_fp8


def eight_bits(name: str) -> str:
    """The scheme with 8 bits, and the same activations, that goes with one of 4; else empty."""
    if not has_four_bits(name):
        return ""
    scheme = SCHEMES[name]
    if scheme.activations is None:
        return INT8_WEIGHTS.name
    return INT8_TOKEN.name if scheme.is_exact else INT8.name


def six_bits(name: str) -> str:
    """The scheme with 6 bits, and the same activations, that goes with one of 4; else empty."""
    if not has_four_bits(name) or SCHEMES[name].is_exact:
        return ""
    return INT6.name if SCHEMES[name].activations is not None else weights_name(INT6.name)


def get_scheme(name: object) -> Scheme:
    """The scheme of that name; ProgramError if there is none."""
    if not isinstance(name, str) or name not in SCHEMES:
        raise ProgramError(f"unknown scheme {name!r}", hint=f"known: {', '.join(SCHEMES)}")
    return SCHEMES[name]
