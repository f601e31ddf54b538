"""Products of int8 codes: rows quantised as they come, by matrices quantised when compiled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import ProgramError
from ..rounding import quantize_i8
from ..schemes import MAX_EXACT_DEPTH, SCHEMES, get_scheme
from ..types import Dim, DType, TensorType
from .base import (
    AttrKind,
    Attrs,
    AttrSpec,
    Cost,
    Kind,
    Op,
    Outputs,
    Types,
    default_cost,
    is_token_dim,
    need_float,
    need_shape,
    tensor,
)

if TYPE_CHECKING:
    import torch

SCHEME = AttrSpec("scheme", AttrKind.STR, choices=tuple(SCHEMES))
QUANTIZERS = frozenset({"quantize_rows", "scaled_moe"})
"""Ops that round values to codes: a difference in the last bit may become one of a whole step."""
_WIDENED_ELEMENTS = 1 << 24
_EXACT_DEPTH = 1024
"""So many products of two codes of 8 bits sum up to 2^24 at most: a whole number in float32."""


def _need(kind: TensorType, dtype: DType, what: str) -> None:
    if kind.dtype is not dtype:
        raise ProgramError(f"{what} is {kind}, expected element type {dtype.value}")


def check_matrix(codes: TensorType, scale: TensorType, depth: Dim, attrs: Attrs, what: str) -> None:
    """ProgramError unless codes of `[.., N, depth]` and their scales fit the scheme in `attrs`."""
    scheme = get_scheme(attrs["scheme"])
    _need(codes, scheme.code_dtype, what)
    if not isinstance(depth, int) or depth > MAX_EXACT_DEPTH:
        raise ProgramError(f"{what} is {codes}: int32 sums hold {MAX_EXACT_DEPTH} products")
    plain = TensorType(DType.F32, (*codes.shape[:-1], depth))
    if codes != scheme.code_type(plain):
        raise ProgramError(
            f"{what} is {codes}, expected {scheme.code_type(plain)} for {depth} columns"
        )
    wanted = scheme.scale_type(plain)
    if scale != wanted:
        raise ProgramError(f"{what}_scale is {scale}, expected {wanted}")


def _quantize_rows(types: Types, attrs: Attrs) -> Outputs:
    x = need_float(tensor(types, 0), "x")
    if not x.shape:
        raise ProgramError(f"x is {x}, expected at least one dimension")
    return TensorType(DType.I8, x.shape), TensorType(DType.F32, x.shape[:-1])


def _quantize_rows_meaning(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return quantize_i8(x)


def _mixes(types: Types, outs: Outputs, attrs: Attrs, token: str) -> str | None:
    last = tensor(types, 0).shape[-1]
    return "sums over tokens" if is_token_dim(last, token) else None


def _scaled_linear(types: Types, attrs: Attrs) -> Outputs:
    x, x_scale = tensor(types, 0, name="x"), tensor(types, 1, name="x_scale")
    w, w_scale = tensor(types, 2, 2, "w"), tensor(types, 3, name="w_scale")
    _need(x, DType.I8, "x")
    _need(x_scale, DType.F32, "x_scale")
    need_shape(x_scale, x.shape[:-1], "x_scale")
    if not x.shape:
        raise ProgramError(f"x is {x}, expected at least one dimension")
    check_matrix(w, w_scale, x.shape[-1], attrs, "w")
    dtype = DType(attrs["dtype"])
    if not dtype.is_float:
        raise ProgramError(f"dtype is {dtype.value}, expected floating point")
    if len(types) > 4:
        bias = tensor(types, 4, 1, "bias")
        _need(bias, dtype, "bias")
        need_shape(bias, w.shape[:1], "bias")
    return (TensorType(dtype, (*x.shape[:-1], w.shape[0])),)


def scaled_linear_meaning(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dtype: str,
    scheme: str,
) -> torch.Tensor:
    """float(sum of x * w) * (x_scale * w_scale) + bias, in float32, rounded once."""
    from ..torch_types import to_torch

    kind = to_torch(DType(dtype))
    integers = get_scheme(scheme).integers(w)[..., : x.shape[-1]]
    y = _exact_products(x, integers).to(x_scale.dtype) * (x_scale[..., None] * w_scale)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(kind)


def _exact_products(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x @ w.T of codes, in float64, which holds every such sum exactly.

    In float32, which torch multiplies twice as fast, sums of `_EXACT_DEPTH` products are exact, in
    any order. Some rows of w at a time, as all of them would take four times their bytes.
    """
    import torch

    rows = max(1, _WIDENED_ELEMENTS // max(1, w.shape[1]))
    slices = x.split(_EXACT_DEPTH, -1)
    parts = []
    for part in w.split(rows):
        total = x.new_zeros((*x.shape[:-1], len(part)), dtype=torch.float64)
        for left, right in zip(slices, part.split(_EXACT_DEPTH, -1), strict=True):
            total += left.float() @ right.float().T
        parts.append(total)
    return torch.cat(parts, -1)


def _scaled_linear_cost(
    types: Types, outs: Outputs, attrs: Attrs, bindings: Mapping[str, int]
) -> Cost:
    base = default_cost(types, outs, attrs, bindings)
    depth = TensorType(DType.I8, tensor(types, 0).shape[-1:]).num_elements(bindings)
    return Cost(base.bytes_read, base.bytes_written, 2 * base.flops * depth)


OPS = (
    Op(
        "quantize_rows",
        Kind.NORM,
        "Codes i8[.., K] and scales f32[..] of x[.., K]: scale = amax / 127, code = "
        "rint(x * (127 / amax)) in float32, ties to even; a row of zeros has scale 0.",
        ("x",),
        _quantize_rows,
        _quantize_rows_meaning,
        mixes=_mixes,
    ),
    Op(
        "scaled_linear",
        Kind.MATRIX,
        "float32(x[.., K] @ w[N, K].T, summed exactly) * (x_scale[..] * w_scale[N]) + bias[N] -> "
        "[.., N] of `dtype`, rounded once. `scheme` defines the value of a code.",
        ("x", "x_scale", "w", "w_scale", "bias?"),
        _scaled_linear,
        scaled_linear_meaning,
        (AttrSpec("dtype", AttrKind.DTYPE), SCHEME),
        cost_rule=_scaled_linear_cost,
        mixes=_mixes,
    ),
)
