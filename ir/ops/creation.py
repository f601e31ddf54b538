"""Ops that make a tensor from nothing: full and iota."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ProgramError
from ..program import Literal
from ..shapes import parse_dim
from ..torch_types import to_torch
from ..types import DType, TensorType
from .base import AttrKind, Attrs, AttrSpec, Kind, Op, Outputs, Types, dims_attr, is_token_dim

if TYPE_CHECKING:
    import torch


def _full(types: Types, attrs: Attrs) -> Outputs:
    dtype, value = DType(attrs["dtype"]), attrs["value"]
    if isinstance(value, bool) != (dtype is DType.BOOL) or (
        isinstance(value, float) and not dtype.is_float
    ):
        raise ProgramError(f"value {value!r} does not fit {dtype.value}")
    return (TensorType(dtype, dims_attr(attrs, "shape")),)


def _full_meaning(*, shape: tuple[int, ...], value: Literal, dtype: str) -> torch.Tensor:
    import torch

    return torch.full(shape, value, dtype=to_torch(dtype))


def _iota(types: Types, attrs: Attrs) -> Outputs:
    dtype, size = DType(attrs["dtype"]), attrs["size"]
    assert isinstance(size, (int, str))
    if dtype is DType.BOOL:
        raise ProgramError("iota does not support bool")
    return (TensorType(dtype, (parse_dim(size),)),)


def _iota_mixes(types: Types, outs: Outputs, attrs: Attrs, token: str) -> str | None:
    if is_token_dim(outs[0].shape[0], token):
        return "counts the rows of the step, which depend on the neighbours"
    return None


def _iota_meaning(*, size: int, dtype: str) -> torch.Tensor:
    import torch

    return torch.arange(size, dtype=to_torch(dtype))


OPS = (
    Op(
        "full",
        Kind.CREATION,
        "A tensor whose elements are all `value`.",
        (),
        _full,
        _full_meaning,
        (
            AttrSpec("shape", AttrKind.DIMS),
            AttrSpec("value", AttrKind.NUMBER),
            AttrSpec("dtype", AttrKind.DTYPE),
        ),
    ),
    Op(
        "iota",
        Kind.CREATION,
        "0, 1, 2, ... below `size`.",
        (),
        _iota,
        _iota_meaning,
        (AttrSpec("size", AttrKind.DIM), AttrSpec("dtype", AttrKind.DTYPE, "i64")),
        mixes=_iota_mixes,
    ),
)
