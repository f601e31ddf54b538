"""Weight schemes: how a matrix is held in fewer bits, described once for every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .errors import ProgramError
from .rounding import GROUP_I4, GROUP_I4_BYTES, integers_i4, quantize_i4, quantize_i8
from .types import Dim, DType, TensorType

if TYPE_CHECKING:
    import torch

Quantizer = Callable[["torch.Tensor"], tuple["torch.Tensor", "torch.Tensor"]]
"""Makes codes and scales of a matrix `[.., N, K]`."""

MAX_EXACT_DEPTH: Final = 65536
"""Products that one int32 sum holds, even where one side is shifted to 0 .. 255."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How `scaled_linear` and `scaled_moe` hold a matrix `[N, K]`, and what multiplies it.

    A weight is an integer of -127 .. 127 times the float32 scale of its output channel. `bits` is
    what its code takes, and `group_bytes` bytes of `code_dtype` hold the codes of `group` elements
    of K, with whatever they share. `quantize` makes codes and scales of a matrix (its last
    dimension is K, the last group padded with zeros), `integers` gives the integers of codes back.
    `tolerance` is what a product of random rows may be off by, relative to a row's largest result.
    The activation's rows are quantised to int8 as they come, one scale a token (`quantize_rows`),
    so that products are sums of integers, exact in any order.
    """

    name: str
    bits: int
    code_dtype: DType
    quantize: Quantizer
    integers: Callable[[torch.Tensor], torch.Tensor]
    tolerance: float
    group: int = 1
    group_bytes: int = 1
    doc: str = ""

    def code_type(self, plain: TensorType) -> TensorType:
        """The type of the codes of a matrix `[.., N, K]`."""
        depth = plain.shape[-1]
        if not isinstance(depth, int):
            raise ProgramError(f"a matrix {plain} has no fixed depth")
        width: Dim = -(-depth // self.group) * self.group_bytes
        return TensorType(self.code_dtype, (*plain.shape[:-1], width))

    def scale_type(self, plain: TensorType) -> TensorType:
        """The type of its scales, `[.., N]`."""
        return TensorType(DType.F32, plain.shape[:-1])

    def num_weights(self, codes: TensorType) -> int:
        """How many weights codes stand for, the last group of each row taken as full."""
        return codes.num_elements() // self.group_bytes * self.group

    def bits_per_weight(self, depth: int) -> float:
        """Bits that a weight of a row of `depth` takes, its share of what it shares included."""
        groups = -(-depth // self.group)
        return (8 * groups * self.group_bytes + 32) / depth


INT8: Final = Scheme(
    "int8",
    8,
    DType.I8,
    quantize_i8,
    lambda codes: codes,
    tolerance=0.05,
    doc="int8 weights, one float32 scale an output channel, round to nearest; int8 activations, "
    "one scale a token (as in LLM.int8 without outliers, and SmoothQuant's O1 granularity)",
)

INT4: Final = Scheme(
    "int4",
    4,
    DType.U8,
    quantize_i4,
    integers_i4,
    tolerance=0.35,
    group=GROUP_I4,
    group_bytes=GROUP_I4_BYTES,
    doc="4-bit codes in groups of 32, each with a whole multiplier of -15 .. 15, one float32 scale "
    "an output channel (QServe's progressive groups, round to nearest); int8 activations, one "
    "scale a token",
)

SCHEMES: Final = {scheme.name: scheme for scheme in (INT8, INT4)}
"""Every scheme by name."""


def get_scheme(name: object) -> Scheme:
    """The scheme of that name; ProgramError where there is none."""
    if not isinstance(name, str) or name not in SCHEMES:
        raise ProgramError(f"unknown scheme {name!r}", hint=f"known: {', '.join(SCHEMES)}")
    return SCHEMES[name]
