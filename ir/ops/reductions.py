"""Ops that combine the elements of a row: sums, softmax, running sums, the largest k."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ProgramError
from ..types import Dim, DType, TensorType
from .base import (
    AttrKind,
    Attrs,
    AttrSpec,
    Kind,
    Meaning,
    Op,
    Outputs,
    Types,
    axes_attr,
    int_attr,
    is_token_dim,
    need_float,
    tensor,
    wide,
)

if TYPE_CHECKING:
    import torch


def _reduce(types: Types, attrs: Attrs) -> Outputs:
    kind, dims = tensor(types, 0), axes_attr(attrs, "dims")
    if kind.dtype is DType.BOOL:
        raise ProgramError(f"operand is {kind}, expected numbers", hint="cast it first")
    if not dims:
        raise ProgramError("dims is empty; name the dimensions to reduce")
    shape: list[Dim] = []
    for i, dim in enumerate(kind.shape):
        if i not in dims:
            shape.append(dim)
        elif attrs["keepdim"]:
            shape.append(1)
    return (TensorType(kind.dtype, tuple(shape)),)


def _mean(types: Types, attrs: Attrs) -> Outputs:
    need_float(tensor(types, 0))
    return _reduce(types, attrs)


def _along(types: Types, attrs: Attrs) -> Outputs:
    return (need_float(tensor(types, 0)),)


def _cumsum(types: Types, attrs: Attrs) -> Outputs:
    kind = tensor(types, 0)
    if kind.dtype is DType.BOOL:
        raise ProgramError(f"operand is {kind}, expected numbers", hint="cast it first")
    return (kind,)


def _topk(types: Types, attrs: Attrs) -> Outputs:
    kind, k = tensor(types, 0), int_attr(attrs, "k")
    if not kind.shape:
        raise ProgramError(f"operand is {kind}, expected at least one dimension")
    last = kind.shape[-1]
    if k < 1 or not isinstance(last, int) or k > last:
        raise ProgramError(f"cannot take the {k} largest of {last}")
    shape = (*kind.shape[:-1], k)
    return TensorType(kind.dtype, shape), TensorType(DType.I64, shape)


def _mixes(types: Types, outs: Outputs, attrs: Attrs, token: str) -> str | None:
    kind = tensor(types, 0)
    if "dims" in attrs:
        dims = axes_attr(attrs, "dims")
    else:
        dims = (int_attr(attrs, "dim") if "dim" in attrs else kind.rank - 1,)
    if any(is_token_dim(kind.shape[dim], token) for dim in dims):
        return "combines elements along the token dimension"
    return None


def _reduction_meaning(name: str) -> Meaning:
    def meaning(x: torch.Tensor, *, dims: tuple[int, ...], keepdim: bool) -> torch.Tensor:
        import torch

        value = wide(x) if x.is_floating_point() else x
        result = getattr(torch, name)(value, dim=dims, keepdim=keepdim)
        assert isinstance(result, torch.Tensor)
        return result.to(x.dtype)

    return meaning


def _softmax_meaning(x: torch.Tensor, *, dim: int) -> torch.Tensor:
    import torch

    return torch.softmax(wide(x), dim).to(x.dtype)


def _cumsum_meaning(x: torch.Tensor, *, dim: int) -> torch.Tensor:
    value = wide(x) if x.is_floating_point() else x
    return value.cumsum(dim).to(x.dtype)


def _topk_meaning(x: torch.Tensor, *, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    # A stable sort, because torch.topk leaves the order of equal values open.
    values, indices = torch.sort(x, dim=-1, descending=True, stable=True)
    return values[..., :k].contiguous(), indices[..., :k].contiguous()


_DIMS = (
    AttrSpec("dims", AttrKind.AXES),
    AttrSpec("keepdim", AttrKind.BOOL, False),
)
_DIM = (AttrSpec("dim", AttrKind.AXIS),)


def _reduction(name: str, doc: str) -> Op:
    rule = _mean if name == "mean" else _reduce
    doc = f"{doc} over `dims`; 16-bit floats are reduced in float32 and rounded once."
    meaning = _reduction_meaning(name)
    return Op(name, Kind.REDUCTION, doc, ("x",), rule, meaning, _DIMS, mixes=_mixes)


OPS = (
    _reduction("sum", "The sum"),
    _reduction("mean", "The mean"),
    _reduction("amax", "The largest element"),
    Op(
        "softmax",
        Kind.REDUCTION,
        "exp(x - max) over its sum along `dim`, in float32, rounded once.",
        ("x",),
        _along,
        _softmax_meaning,
        _DIM,
        mixes=_mixes,
    ),
    Op(
        "cumsum",
        Kind.REDUCTION,
        "The running sum along `dim`.",
        ("x",),
        _cumsum,
        _cumsum_meaning,
        _DIM,
        mixes=_mixes,
    ),
    Op(
        "topk",
        Kind.REDUCTION,
        "The k largest of the last dimension, descending, ties to the lower index: values, "
        "indices (i64).",
        ("x",),
        _topk,
        _topk_meaning,
        (AttrSpec("k", AttrKind.INT),),
        mixes=_mixes,
    ),
)
