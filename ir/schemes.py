"""Weight schemes: how a matrix is held in fewer bits, described once for every backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .errors import ProgramError
from .types import DType, TensorType

if TYPE_CHECKING:
    import torch

LARGEST_I8: Final = 127
"""Codes are -127 .. 127: symmetric, so that zero is a code and every code has its negative."""
TINY: Final = 1e-30
"""A row whose largest magnitude is below this is all zeros: its inverse would overflow."""
MAX_EXACT_DEPTH: Final = 65536
"""Products that one int32 sum holds, even where one side is shifted to 0 .. 255."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How `scaled_linear` and `scaled_moe` hold a matrix `[N, K]`, and what multiplies it.

    A code stands for `code * scale`; `group` elements of K share a scale (None: a whole row, one
    scale an output channel). `code_dtype` is the element type of stored codes, `bits` what one
    takes. The activation's rows are quantised to int8 as they come, one scale a token
    (`quantize_rows`), so that products are sums of integers, exact in any order.
    """

    name: str
    bits: int
    code_dtype: DType
    group: int | None = None
    doc: str = ""

    def code_type(self, plain: TensorType) -> TensorType:
        """The type of the codes of a matrix `[.., N, K]`."""
        return TensorType(self.code_dtype, plain.shape)

    def scale_type(self, plain: TensorType) -> TensorType:
        """The type of its scales, `[.., N]`."""
        return TensorType(DType.F32, plain.shape[:-1])

    def bits_per_weight(self, depth: int) -> float:
        """Bits that a weight of a row of `depth` takes, its share of the scale included."""
        return self.bits + 32 / (self.group or depth)


INT8: Final = Scheme(
    "int8",
    8,
    DType.I8,
    doc="int8 weights, one float32 scale an output channel, round to nearest; int8 activations, "
    "one scale a token (as in LLM.int8 without outliers, and SmoothQuant's O1 granularity)",
)

SCHEMES: Final = {scheme.name: scheme for scheme in (INT8,)}
"""Every scheme by name."""


def get_scheme(name: object) -> Scheme:
    """The scheme of that name; ProgramError where there is none."""
    if not isinstance(name, str) or name not in SCHEMES:
        raise ProgramError(f"unknown scheme {name!r}", hint=f"known: {', '.join(SCHEMES)}")
    return SCHEMES[name]


def quantize_i8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (int8) and scales of each row of the last dimension, round to nearest even.

    In float32 (float64 stays, for the scales too): `scale = amax / 127`, `code = rint(x * (127 /
    amax))` clamped to -127 .. 127; a row below `TINY` gets zeros for both, one with NaN a scale of
    NaN. Every backend does the same operations, so that equal inputs give equal codes.
    """
    import torch

    value = x if x.dtype == torch.float64 else x.float()
    top = value.abs().amax(-1, keepdim=True)
    used = ~(top < TINY)  # NaN counts as used: it must show in the scale, not turn into zeros
    inverse = torch.where(used, LARGEST_I8 / top.clamp_min(TINY), 0.0)
    codes = (value * inverse).round().clamp(-LARGEST_I8, LARGEST_I8).to(torch.int8)
    scale = torch.where(used, top / LARGEST_I8, 0.0).squeeze(-1)
    return codes, scale
