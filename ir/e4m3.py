"""Numbers of 8 bits with an exponent of 4 and a mantissa of 3 (e4m3fn): their bytes and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from .rounding import TINY

if TYPE_CHECKING:
    import torch

LARGEST_E4M3: Final = 448.0
"""The largest of them. There is no infinity: what is larger becomes this."""
NAN_E4M3: Final = 0x7F
"""The byte of NaN, also with the sign bit set. All others stand for numbers."""
_SIGN: Final = 0x80
_LEAST_EXPONENT: Final = -6
_MANTISSA_BITS: Final = 3
_PART: Final = 1 << 20
"""Weights of a large matrix that are rounded at a time."""


def _level(code: int) -> float:
    exponent, mantissa = (code & ~_SIGN) >> _MANTISSA_BITS, code & 7
    if code & ~_SIGN == NAN_E4M3:
        return float("nan")
    # With an exponent of 0, numbers are subnormal: there is no leading one.
    whole = mantissa + (8 if exponent else 0)
    size = whole * 2.0 ** (max(exponent, 1) - 1 + _LEAST_EXPONENT - _MANTISSA_BITS)
    return -size if code & _SIGN else size


E4M3_LEVELS: Final = tuple(_level(code) for code in range(256))
"""What each byte stands for."""


def encode_e4m3(values: torch.Tensor) -> torch.Tensor:
    """The bytes of the nearest numbers, of a tensor of any floating-point type.

    Ties go to the even mantissa, what is above the largest number becomes that, also infinity, and
    NaN stays NaN. Each value is rounded once: float64 is not rounded to float32 before.
    """
    import torch

    if values.dtype == torch.float64:
        return _encoded(values)
    limited = values.float().clamp(-LARGEST_E4M3, LARGEST_E4M3)
    return limited.to(torch.float8_e4m3fn).view(torch.uint8)


def _encoded(values: torch.Tensor) -> torch.Tensor:
    """The same by arithmetic: torch would round float64 to float32 first."""
    import torch

    size = values.abs().clamp_(max=LARGEST_E4M3)
    _, above = torch.frexp(size.clamp_min(2.0**_LEAST_EXPONENT))
    exponent = above - 1
    # Whole numbers of 4 bits, or 16 where a number is rounded to the next power of two: added to
    # the code of the exponent, this is the next code as well. Subnormal numbers have the least
    # exponent and no leading one, which is what the code of it stands for.
    mantissa = torch.ldexp(size, _MANTISSA_BITS - exponent).round_()
    codes = (exponent - _LEAST_EXPONENT) * 8 + mantissa
    codes = torch.where(values.isnan(), float(NAN_E4M3), codes) + values.signbit() * _SIGN
    return codes.to(torch.uint8)


def decode_e4m3(codes: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The numbers that bytes stand for, in float32 or another type that holds them."""
    import torch

    levels = torch.tensor(E4M3_LEVELS, dtype=dtype or torch.float32)
    return levels.index_select(0, codes.flatten().int()).view(codes.shape)


def quantize_e4m3(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (uint8) and scales of each row of the last dimension.

    In float32 (float64 stays, for the scales too): `scale = amax / 448`, and the code of `x * (448
    / amax)`; a row below `TINY` gets zeros for both, one with NaN a scale of NaN. Every backend
    does the same operations, so that equal inputs give equal codes.
    """
    value = _wide(x)
    return _quantized(value, _tops(value))


def quantize_e4m3_rows(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, some rows at a time: of a large matrix, numbers in float32 take gigabytes."""
    import torch

    if w.numel() <= _PART:
        return quantize_e4m3(w)
    parts = w.reshape(-1, w.shape[-1]).split(max(1, _PART // w.shape[-1]))
    codes, scales = zip(*map(quantize_e4m3, parts), strict=True)
    return torch.cat(codes).reshape(w.shape), torch.cat(scales).reshape(w.shape[:-1])


def quantize_e4m3_matrix(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize_e4m3`, but all rows of a matrix `[N, K]` of `[.., N, K]` have one scale."""
    value = _wide(w)
    return _quantized(value, _tops(value.flatten(-2))[..., None].expand(w.shape[:-1]))


def quantize_e4m3_groups(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize_e4m3` for each `group` elements of a row: scales are `[.., ceil(K / group)]`."""
    import torch

    depth = x.shape[-1]
    groups = -(-depth // group)
    padded = torch.nn.functional.pad(x, (0, groups * group - depth))
    codes, scales = quantize_e4m3(padded.reshape(*x.shape[:-1], groups, group))
    return codes.flatten(-2)[..., :depth], scales


def quantize_e4m3_tiles(w: torch.Tensor, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize_e4m3` for squares of `tile` rows and columns of `[.., N, K]`.

    The scales are `[.., ceil(N / tile), ceil(K / tile)]`.
    """
    import torch

    *lead, rows, depth = w.shape
    down, across = -(-rows // tile), -(-depth // tile)
    size = across * tile - depth, down * tile - rows
    padded = torch.nn.functional.pad(_wide(w), (0, size[0], 0, size[1]))
    tiles = padded.reshape(*lead, down, tile, across, tile).transpose(-3, -2)
    codes, scales = quantize_e4m3(tiles.flatten(-2))
    whole = codes.unflatten(-1, (tile, tile)).transpose(-3, -2)
    whole = whole.reshape(*lead, down * tile, across * tile)
    return whole[..., :rows, :depth].contiguous(), scales


def _wide(x: torch.Tensor) -> torch.Tensor:
    import torch

    return x if x.dtype == torch.float64 else x.float()


def _tops(value: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each row; 0 for rows without elements."""
    return value.abs().amax(-1) if value.shape[-1] else value.new_zeros(value.shape[:-1])


def _quantized(value: torch.Tensor, top: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of rows whose largest magnitudes are `top`, and the scales of the rows."""
    scale, inverse = e4m3_scales(top)
    return encode_e4m3(value * inverse[..., None]), scale


def e4m3_scales(top: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales of what has these largest magnitudes, and what it is multiplied by."""
    import torch

    used = ~(top < TINY)  # NaN counts as used: it must show in the scale, not turn into zeros
    # Of a number and a tensor, torch would take the reciprocal first, and round twice.
    inverse = torch.where(used, torch.tensor(LARGEST_E4M3) / top.clamp_min(TINY), 0.0)
    return torch.where(used, top / LARGEST_E4M3, 0.0), inverse
