"""How rows become codes of few bits, and codes integers again: what schemes are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import torch

LARGEST_I8: Final = 127
"""Codes are -127 .. 127: symmetric, so that zero is a code and every code has its negative."""
TINY: Final = 1e-30
"""A row whose largest magnitude is below this is all zeros: its inverse would overflow."""

GROUP_I4: Final = 32
"""Weights of a row that share a multiplier."""
GROUP_I4_BYTES: Final = 1 + GROUP_I4 // 2
"""The multiplier (a signed byte), then 16 bytes: byte i holds `code[i] + 8` in its lower half and
`code[i + 16] + 8` in its upper."""
LOWEST_I4: Final = -8
MOST_MULTIPLIER: Final = 15
"""Times a code it stays within -120 .. 120, so that a weight is a signed byte."""
_CHUNK = 1 << 18
"""Weights at a time: what is made of them on the way stays in the caches."""


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
    # Of a number and a tensor, torch would take the reciprocal first, and round twice.
    inverse = torch.where(used, torch.tensor(float(LARGEST_I8)) / top.clamp_min(TINY), 0.0)
    codes = (value * inverse).round().clamp(-LARGEST_I8, LARGEST_I8).to(torch.int8)
    scale = torch.where(used, top / LARGEST_I8, 0.0).squeeze(-1)
    return codes, scale


def quantize_groups_i8(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `quantize_i8` for each `group` elements of a row: scales are `[.., ceil(K / group)]`."""
    import torch

    depth = x.shape[-1]
    groups = -(-depth // group)
    padded = torch.nn.functional.pad(x, (0, groups * group - depth))
    codes, scales = quantize_i8(padded.reshape(*x.shape[:-1], groups, group))
    return codes.flatten(-2)[..., :depth], scales


def quantize_i4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (uint8, groups of `GROUP_I4_BYTES`) and scales of each row of the last dimension.

    A weight is `code * multiplier * scale`, as in QServe (Lin et al. 2024), where the group's
    multiplier is a small integer. Here it has a sign, which gives the group's largest weight the
    code -8, and of the integer nearest to what that needs and its neighbours the one is taken
    whose group has the least squared error. `scale = amax / 120`; a row below `TINY` is zeros.
    """
    import torch

    value = w.float()
    scale = value.abs().amax(-1) / (-LOWEST_I4 * MOST_MULTIPLIER)
    scale = torch.where(scale * -LOWEST_I4 * MOST_MULTIPLIER < TINY, 0.0, scale)
    groups = -(-w.shape[-1] // GROUP_I4)
    padded = torch.nn.functional.pad(value, (0, groups * GROUP_I4 - w.shape[-1]))
    units = torch.where(scale == 0, 0.0, 1 / scale.clamp_min(TINY))
    rows = (padded * units[..., None]).reshape(-1, GROUP_I4)
    parts = [_code_groups(part) for part in rows.split(_CHUNK // GROUP_I4)]
    codes = torch.cat(parts).reshape(*w.shape[:-1], groups * GROUP_I4_BYTES)
    return codes, scale


def _code_groups(x: torch.Tensor) -> torch.Tensor:
    """Groups [G, 32] in units of their row's scale, as bytes [G, 17]."""
    best = best_multipliers(x)
    return pack_i4(_nearest_codes(x, best), best)


def best_multipliers(x: torch.Tensor) -> torch.Tensor:
    """The multiplier [G, 1] of each group [G, 32] in units of its row's scale."""
    import torch

    top = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    nearest = (top.abs() / -LOWEST_I4).round()
    sign = torch.where(top > 0, -1.0, 1.0)
    best, error = None, None
    for step in (0, -1, 1):
        multiplier = sign * (nearest + step).clamp(1, MOST_MULTIPLIER)
        wrong = _nearest_codes(x, multiplier).mul_(multiplier).sub_(x).square_()
        wrong = wrong.sum(-1, keepdim=True)
        if best is None or error is None:
            best, error = multiplier, wrong
        else:
            best = torch.where(wrong < error, multiplier, best)
            error = torch.minimum(wrong, error)
    assert best is not None
    return best


def pack_i4(codes: torch.Tensor, multipliers: torch.Tensor) -> torch.Tensor:
    """Bytes [G, 17] of codes [G, 32] (-8 .. 7, in float) and multipliers [G, 1]."""
    import torch

    shifted = (codes - LOWEST_I4).to(torch.uint8)
    half = GROUP_I4 // 2
    pairs = shifted[:, :half] | (shifted[:, half:] << 4)
    return torch.cat([multipliers.to(torch.int8).view(torch.uint8), pairs], -1)


def _nearest_codes(x: torch.Tensor, multiplier: torch.Tensor) -> torch.Tensor:
    return (x / multiplier).round_().clamp_(LOWEST_I4, -LOWEST_I4 - 1)
