"""Products by matrices of codes; rows are quantised as they come, or stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ..cost import Cost
from ..errors import ProgramError
from ..row_codes import I8_ROWS, ROW_CODES, get_row_codes
from ..schemes import MAX_EXACT_DEPTH, SCHEMES, Scheme, get_scheme
from ..types import Dim, DType, TensorType
from .base import (
    AttrKind,
    Attrs,
    AttrSpec,
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
_WIDENED_ELEMENTS = 1 << 22
_EXACT_DEPTH = 1024
"""So many products of two codes of 8 bits sum up to 2^24 at most: a whole number in float32."""


def _need(kind: TensorType, dtype: DType, what: str) -> None:
    if kind.dtype is not dtype:
        raise ProgramError(f"{what} is {kind}, expected element type {dtype.value}")


def check_matrix(codes: TensorType, scale: TensorType, depth: Dim, attrs: Attrs, what: str) -> None:
    """ProgramError unless codes of `[.., N, depth]` and their scales fit the scheme in `attrs`."""
    scheme = get_scheme(attrs["scheme"])
    _need(codes, scheme.weight.code_dtype, what)
    if not isinstance(depth, int):
        raise ProgramError(f"{what} is {codes}: its rows have no fixed length")
    if scheme.is_exact and depth > MAX_EXACT_DEPTH:
        raise ProgramError(f"{what} is {codes}: int32 sums hold {MAX_EXACT_DEPTH} products")
    plain = TensorType(DType.F32, (*codes.shape[:-1], depth))
    wanted = scheme.weight.code_type(plain)
    if codes != wanted:
        raise ProgramError(f"{what} is {codes}, expected {wanted} for {depth} columns")
    wanted = scheme.weight.scale_type(plain)
    if scale != wanted:
        raise ProgramError(f"{what}_scale is {scale}, expected {wanted}")


def _quantize_rows(types: Types, attrs: Attrs) -> Outputs:
    x = need_float(tensor(types, 0), "x")
    if not x.shape:
        raise ProgramError(f"x is {x}, expected at least one dimension")
    group, codes = attrs["group"], get_row_codes(attrs["codes"])
    if group not in (0, codes.group):
        raise ProgramError(f"group is {group}, expected 0 or {codes.group}")
    if group and not isinstance(x.shape[-1], int):
        raise ProgramError(f"x is {x}: rows have no fixed number of groups")
    scales = scale_shape(x.shape, int(group))
    return TensorType(codes.dtype, x.shape), TensorType(DType.F32, scales)


def scale_shape(shape: tuple[Dim, ...], group: int) -> tuple[Dim, ...]:
    """The shape of the scales of rows of `shape`: one for each row (0), or for each group."""
    *lead, depth = shape
    return (*lead, -(-depth // group)) if group and isinstance(depth, int) else tuple(lead)


def quantize_rows_meaning(
    x: torch.Tensor, group: int = 0, codes: str = I8_ROWS.name
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of rows `[.., K]`, one scale for each row, or for each group of elements."""
    kind = get_row_codes(codes)
    return kind.groups(x, group) if group else kind.rows(x)


def _mixes(types: Types, outs: Outputs, attrs: Attrs, token: str) -> str | None:
    last = tensor(types, 0).shape[-1]
    return "sums over tokens" if is_token_dim(last, token) else None


def _scaled_linear(types: Types, attrs: Attrs) -> Outputs:
    x, x_scale = tensor(types, 0, name="x"), tensor(types, 1, name="x_scale")
    w, w_scale = tensor(types, 2, 2, "w"), tensor(types, 3, name="w_scale")
    scheme = get_scheme(attrs["scheme"])
    if scheme.activations is None:
        raise ProgramError(f"scheme {scheme.name} multiplies rows as they are: decoded_linear")
    _need(x, scheme.activations.codes.dtype, "x")
    _need(x_scale, DType.F32, "x_scale")
    if not x.shape:
        raise ProgramError(f"x is {x}, expected at least one dimension")
    need_shape(x_scale, scale_shape(x.shape, scheme.activations.group), "x_scale")
    check_matrix(w, w_scale, x.shape[-1], attrs, "w")
    return _product(x, w, types[4:], attrs)


def _product(x: TensorType, w: TensorType, biases: Types, attrs: Attrs) -> tuple[TensorType]:
    """The type of the product of x by the codes w of a matrix."""
    dtype = DType(attrs["dtype"])
    if not dtype.is_float:
        raise ProgramError(f"dtype is {dtype.value}, expected floating point")
    if biases:
        bias = need_float(tensor(biases, 0, 1, "bias"), "bias")
        need_shape(bias, w.shape[:1], "bias")
    return (TensorType(dtype, (*x.shape[:-1], w.shape[0])),)


def _decoded_linear(types: Types, attrs: Attrs) -> Outputs:
    x = need_float(tensor(types, 0, name="x"), "x")
    w, w_scale = tensor(types, 1, 2, "w"), tensor(types, 2, name="w_scale")
    if not x.shape:
        raise ProgramError(f"x is {x}, expected at least one dimension")
    scheme = get_scheme(attrs["scheme"])
    if scheme.activations is not None:
        raise ProgramError(f"scheme {scheme.name} multiplies quantized rows: scaled_linear")
    check_matrix(w, w_scale, x.shape[-1], attrs, "w")
    return _product(x, w, types[3:], attrs)


def _code_depths(types: Types, attrs: Attrs) -> Mapping[int, Dim]:
    return {2: tensor(types, 0).shape[-1]}


def _decoded_code_depths(types: Types, attrs: Attrs) -> Mapping[int, Dim]:
    return {1: tensor(types, 0).shape[-1]}


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
    """The sums of the scheme, times w_scale, plus the bias, in float32, rounded once.

    Exact sums are multiplied by x_scale * w_scale, also those of e4m3 with scales of rows: of
    `MAX_EXACT_DEPTH` products, float64 holds the sum. Sums of groups are those of the numbers that
    codes stand for: exact sums within a group would only differ in rounding, as their order does.
    """
    import torch

    how = get_scheme(scheme)
    rows = how.activations
    assert rows is not None, "types were inferred"
    if rows.group:
        wide = rows.codes.decode(x, x_scale, rows.group, x_scale.dtype)
        return decoded_linear_meaning(wide, w, w_scale, bias, dtype=dtype, scheme=scheme)
    if how.is_exact:
        y = _exact_products(x, _integers(how, w, x.shape[-1]))
    else:
        y = _level_products(rows.codes.levels(x, torch.float64), how, w, None)
    return _finished(y.to(x_scale.dtype) * (x_scale[..., None] * w_scale), bias, dtype)


def decoded_linear_meaning(
    x: torch.Tensor,
    w: torch.Tensor,
    w_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dtype: str,
    scheme: str,
) -> torch.Tensor:
    """x `[.., K]` by the numbers that codes stand for, times w_scale, plus the bias, in float32.

    Scales of tiles multiply the numbers, before they are summed. Rounded once to `dtype`. In
    float64 where x or w_scale is.
    """
    import torch

    how, wide = get_scheme(scheme), x.to(torch.promote_types(x.dtype, w_scale.dtype))
    if how.weight.tile:
        return _finished(_level_products(wide, how, w, w_scale), bias, dtype)
    return _finished(_level_products(wide, how, w, None).mul_(w_scale), bias, dtype)


def _level_products(
    x: torch.Tensor, scheme: Scheme, w: torch.Tensor, tiles: torch.Tensor | None
) -> torch.Tensor:
    """x by the numbers that codes stand for in units of their row's scale, or of the scales of
    tiles, which are in them."""
    y = x.new_empty((*x.shape[:-1], len(w)))  # the results of a head are large: only once
    first = 0
    for part in _decoded(scheme, w, x.dtype, x.shape[-1], tiles):
        y[..., first : first + len(part)] = x @ part.T
        first += len(part)
    return y


def _finished(y: torch.Tensor, bias: torch.Tensor | None, dtype: str) -> torch.Tensor:
    """Scaled sums plus the bias, rounded to `dtype`."""
    from ..torch_types import to_torch

    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(to_torch(DType(dtype)))


def _integers(scheme: Scheme, codes: torch.Tensor, depth: int) -> torch.Tensor:
    """The integers (-127 .. 127) that codes `[N, ..]` of an exact scheme stand for."""
    parts = scheme.weight.split(codes)
    levels = scheme.weight.code_levels(parts["codes"])
    if "scale" in parts:
        levels = levels * parts["scale"]
    return levels.flatten(-2)[..., :depth]


def _decoded(
    scheme: Scheme,
    codes: torch.Tensor,
    dtype: torch.dtype,
    depth: int,
    tiles: torch.Tensor | None,
) -> Iterator[torch.Tensor]:
    """The numbers that codes `[N, ..]` stand for in units of their row's scale, some rows at a
    time; with scales of tiles, the numbers themselves.

    All of them would take many times the bytes of the codes.
    """
    import torch

    tile = scheme.weight.tile or 1
    rows = max(1, _WIDENED_ELEMENTS // max(1, depth) // tile) * tile
    for place, part in enumerate(codes.split(rows)):
        first = place * (rows // tile)
        scales = torch.ones(len(part)) if tiles is None else tiles[first : first + rows // tile]
        yield scheme.weight.decode(part, scales.to(dtype), depth)


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
        "rint(x * (127 / amax)) in float32, ties to even; a row of zeros has scale 0. With a "
        "`group`, the same for each 32 elements of a row: scales f32[.., ceil(K / 32)]. Where "
        "`codes` is e4m3, codes are bytes u8[.., K] of the numbers nearest to x * (448 / amax), "
        "scale = amax / 448, and a group has 128 elements.",
        ("x",),
        _quantize_rows,
        quantize_rows_meaning,
        (
            AttrSpec("group", AttrKind.INT, 0),
            AttrSpec("codes", AttrKind.STR, I8_ROWS.name, choices=tuple(ROW_CODES)),
        ),
        mixes=_mixes,
    ),
    Op(
        "scaled_linear",
        Kind.MATRIX,
        "x[.., K] @ w[N, K].T * w_scale[N] + bias[N] -> [.., N] of `dtype`, rounded once. `scheme` "
        "defines the values of codes: exact sums are multiplied by x_scale[..] * w_scale; sums of "
        "groups by x_scale[.., ceil(K / 32)] and added in float32, in ascending order. Codes of "
        "e4m3 are summed in float32, in any order; with w_scale[ceil(N / 128), ceil(K / 128)], "
        "sums of groups of 128 are multiplied by it and by x_scale[.., ceil(K / 128)].",
        ("x", "x_scale", "w", "w_scale", "bias?"),
        _scaled_linear,
        scaled_linear_meaning,
        (AttrSpec("dtype", AttrKind.DTYPE), SCHEME),
        cost_rule=_scaled_linear_cost,
        mixes=_mixes,
        code_depths=_code_depths,
    ),
    Op(
        "decoded_linear",
        Kind.MATRIX,
        "x[.., K] @ w[N, K].T * w_scale[N] + bias[N] -> [.., N] of `dtype`, rounded once. x is "
        "floating point and stays as it is; `scheme` defines the numbers that codes stand for. "
        "Everything is in float32: sums of groups times their scales, added in ascending order; "
        "of e4m3 in any order, also with w_scale[ceil(N / 128), ceil(K / 128)].",
        ("x", "w", "w_scale", "bias?"),
        _decoded_linear,
        decoded_linear_meaning,
        (AttrSpec("dtype", AttrKind.DTYPE), SCHEME),
        cost_rule=_scaled_linear_cost,
        mixes=_mixes,
        code_depths=_decoded_code_depths,
    ),
)
