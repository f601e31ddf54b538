"""Matrix products: linear (by a weight) and matmul (of two values)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..cost import Cost
from ..errors import ProgramError
from ..shapes import broadcast
from ..types import TensorType
from .base import (
    RESULT_DTYPE,
    Attrs,
    Kind,
    Op,
    Outputs,
    Types,
    as_result,
    default_cost,
    is_token_dim,
    matrix_dtype,
    need_float,
    need_shape,
    result_dtype,
    rounded,
    same_dtype,
    tensor,
    wide,
)

if TYPE_CHECKING:
    import torch


def _linear(types: Types, attrs: Attrs) -> Outputs:
    x, w = need_float(tensor(types, 0), "x"), tensor(types, 1, 2, "w")
    matrix_dtype(x, w)
    if not x.shape or x.shape[-1] != w.shape[1]:
        raise ProgramError(f"x is {x} and w {w}: their last dimensions differ")
    if len(types) > 2:
        bias = need_float(tensor(types, 2, 1, "bias"), "bias")
        need_shape(bias, w.shape[:1], "bias")
    return (TensorType(result_dtype(x, attrs), (*x.shape[:-1], w.shape[0])),)


def linear_meaning(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    dtype: str | None = None,
) -> torch.Tensor:
    """x @ w.T + bias in at least float32, rounded once to `dtype`, or to x's element type.

    Rows of x are rounded to the element type of w first where that is narrower.
    """
    import torch.nn.functional

    rows = rounded(x, w)
    wide_bias = None if bias is None else bias.to(rows.dtype)
    product = torch.nn.functional.linear(rows, w.to(rows.dtype), wide_bias)
    return as_result(product, x, dtype)


def _linear_mixes(types: Types, outs: Outputs, attrs: Attrs, token: str) -> str | None:
    return "sums over tokens" if is_token_dim(tensor(types, 0).shape[-1], token) else None


def _linear_cost(types: Types, outs: Outputs, attrs: Attrs, bindings: Mapping[str, int]) -> Cost:
    base = default_cost(types, outs, attrs, bindings)
    depth = TensorType(outs[0].dtype, tensor(types, 0).shape[-1:]).num_elements(bindings)
    return Cost(base.bytes_read, base.bytes_written, 2 * base.flops * depth)


def _matmul(types: Types, attrs: Attrs) -> Outputs:
    a, b = need_float(tensor(types, 0), "a"), tensor(types, 1)
    dtype = same_dtype(a, b)
    if a.rank < 2 or b.rank < 2:
        raise ProgramError(f"a is {a} and b {b}, expected at least two dimensions each")
    if a.shape[-1] != b.shape[-2]:
        raise ProgramError(f"a is {a} and b {b}: {a.shape[-1]} against {b.shape[-2]}")
    batch = broadcast([a.shape[:-2], b.shape[:-2]])
    return (TensorType(dtype, (*batch, a.shape[-2], b.shape[-1])),)


def _matmul_mixes(types: Types, outs: Outputs, attrs: Attrs, token: str) -> str | None:
    return "sums over tokens" if is_token_dim(tensor(types, 0).shape[-1], token) else None


def _matmul_meaning(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (wide(a) @ wide(b)).to(a.dtype)


OPS = (
    Op(
        "linear",
        Kind.MATRIX,
        "x[.., K] @ w[N, K].T + bias[N] -> [.., N] of `dtype`, or else of x's type; accumulated in "
        "float32, rounded once. Rows of float32 meet a matrix of 16 bits rounded to its type.",
        ("x", "w", "bias?"),
        _linear,
        linear_meaning,
        (RESULT_DTYPE,),
        cost_rule=_linear_cost,
        mixes=_linear_mixes,
    ),
    Op(
        "matmul",
        Kind.MATRIX,
        "a[.., M, K] @ b[.., K, N] -> [.., M, N]; leading dimensions broadcast; accumulated in "
        "float32, rounded once.",
        ("a", "b"),
        _matmul,
        _matmul_meaning,
        cost_rule=_linear_cost,
        mixes=_matmul_mixes,
    ),
)
