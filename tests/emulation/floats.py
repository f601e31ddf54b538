"""Floating-point formats that numpy does not have: bfloat16, tf32, and floats of eight bits."""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

EIGHT_BITS: Final = {"e4m3": (4, 3, 448.0), "e5m2": (5, 2, 57344.0)}
"""Bits of the exponent and of the mantissa, and the largest finite number."""


def from_bfloat16(bits: Array) -> Array:
    """float32 of the bits of bfloat16."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(values: Array) -> Array:
    """The bits of bfloat16, rounded to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    lost = np.isnan(values)
    return np.where(lost, np.uint16(0x7FFF), rounded) if lost.any() else rounded


def to_tf32(values: Array) -> Array:
    """float32 with 10 bits of mantissa; tensor cores ignore the rest."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


@cache
def eight_bit_values(kind: str) -> Array:
    """float32 of all 256 patterns."""
    exponent_bits, mantissa_bits, _ = EIGHT_BITS[kind]
    bias = (1 << (exponent_bits - 1)) - 1
    patterns = np.arange(256)
    exponent = (patterns >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = patterns & ((1 << mantissa_bits) - 1)
    scale = np.exp2(np.maximum(exponent, 1) - bias - mantissa_bits)
    values = (mantissa + (exponent > 0) * (1 << mantissa_bits)) * scale
    if kind == "e4m3":
        values[(patterns & 0x7F) == 0x7F] = np.nan
    else:
        top = exponent == 31
        values[top] = np.where(mantissa[top] == 0, np.inf, np.nan)
    signed: Array = np.where(patterns & 0x80, -values, values).astype(np.float32)
    return signed


@cache
def _boundaries(kind: str) -> Array:
    """The midpoints between neighbours of the finite numbers that are not negative."""
    values = eight_bit_values(kind)[:128].astype(np.float64)
    finite = values[np.isfinite(values)]
    boundaries: Array = (finite[1:] + finite[:-1]) / 2
    return boundaries


def to_eight_bits(kind: str, values: Array) -> Array:
    """The nearest pattern, ties to even; what is beyond the largest becomes the largest."""
    wide = np.asarray(values, np.float64)
    size = np.abs(wide)
    boundaries = _boundaries(kind)
    low = np.searchsorted(boundaries, size, side="left")
    high = np.searchsorted(boundaries, size, side="right")
    pattern = np.where(low == high, low, np.where(low % 2 == 0, low, high)).astype(np.uint8)
    pattern = np.where(np.isnan(wide), np.uint8(0x7F), pattern)
    return pattern | (np.signbit(wide).astype(np.uint8) << np.uint8(7))
