"""Normalisations over the last dimension, alone or behind a residual addition."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ProgramError
from ..types import TensorType
from .base import (
    RESULT_DTYPE,
    AttrKind,
    Attrs,
    AttrSpec,
    Kind,
    Op,
    Outputs,
    Types,
    as_result,
    is_token_dim,
    need_float,
    need_shape,
    result_dtype,
    same_dtype,
    tensor,
    wide,
)

if TYPE_CHECKING:
    import torch


def _norm(types: Types, attrs: Attrs) -> Outputs:
    x = need_float(tensor(types, 0), "x")
    if not x.shape:
        raise ProgramError(f"x is {x}, expected at least one dimension")
    for i in range(1, len(types)):
        weight = need_float(tensor(types, i, 1), "weight")
        need_shape(weight, x.shape[-1:], "weight")
    return (TensorType(result_dtype(x, attrs), x.shape),)


def _add_norm(types: Types, attrs: Attrs) -> Outputs:
    x, residual = tensor(types, 0), tensor(types, 1)
    same_dtype(x, residual)
    need_shape(residual, x.shape, "residual")
    return (*_norm([types[0], *types[2:]], attrs), x)


def _mixes(types: Types, outs: Outputs, attrs: Attrs, token: str) -> str | None:
    return "normalises over tokens" if is_token_dim(outs[0].shape[-1], token) else None


def rms_norm_meaning(
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    eps: float,
    round_before_scale: bool,
    dtype: str | None = None,
) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * w over the last dimension."""
    value = wide(x)
    normed = value * (value.square().mean(-1, keepdim=True) + eps).rsqrt()
    scaled = normed.to(x.dtype) * w if round_before_scale else normed * wide(w)
    return as_result(scaled, x, dtype)


def layer_norm_meaning(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None = None,
    *,
    eps: float,
    dtype: str | None = None,
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * w + b over the last dimension."""
    import torch.nn.functional

    value = wide(x)
    wide_w, wide_b = w.to(value.dtype), None if b is None else b.to(value.dtype)
    normed = torch.nn.functional.layer_norm(value, x.shape[-1:], wide_w, wide_b, eps)
    return as_result(normed, x, dtype)


def _add_rms_norm_meaning(
    x: torch.Tensor,
    residual: torch.Tensor,
    w: torch.Tensor,
    *,
    eps: float,
    round_before_scale: bool,
    dtype: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    normed = rms_norm_meaning(total, w, eps=eps, round_before_scale=round_before_scale, dtype=dtype)
    return normed, total


def _add_layer_norm_meaning(
    x: torch.Tensor,
    residual: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None = None,
    *,
    eps: float,
    dtype: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = x + residual
    return layer_norm_meaning(total, w, b, eps=eps, dtype=dtype), total


_EPS = AttrSpec("eps", AttrKind.FLOAT)
_RMS = (_EPS, AttrSpec("round_before_scale", AttrKind.BOOL, True), RESULT_DTYPE)

OPS = (
    Op(
        "rms_norm",
        Kind.NORM,
        "x / sqrt(mean(x²) + eps) * w over the last dimension, in float32. With "
        "`round_before_scale` the normed value is rounded to x's element type before the "
        "weight (Llama), else after it (Gemma). The result is of `dtype`, or else of x's type.",
        ("x", "w"),
        _norm,
        rms_norm_meaning,
        _RMS,
        mixes=_mixes,
    ),
    Op(
        "add_rms_norm",
        Kind.NORM,
        "`rms_norm` of x + residual, and that sum (rounded to the element type first).",
        ("x", "residual", "w"),
        _add_norm,
        _add_rms_norm_meaning,
        _RMS,
        mixes=_mixes,
    ),
    Op(
        "layer_norm",
        Kind.NORM,
        "(x - mean) / sqrt(variance + eps) * w + b over the last dimension, in float32, "
        "rounded once to `dtype`, or else to x's type.",
        ("x", "w", "b?"),
        _norm,
        layer_norm_meaning,
        (_EPS, RESULT_DTYPE),
        mixes=_mixes,
    ),
    Op(
        "add_layer_norm",
        Kind.NORM,
        "`layer_norm` of x + residual, and that sum (rounded to the element type first).",
        ("x", "residual", "w", "b?"),
        _add_norm,
        _add_layer_norm_meaning,
        (_EPS, RESULT_DTYPE),
        mixes=_mixes,
    ),
)
