"""Ops that pick rows or elements by index, and that put a number where an index says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..cost import Cost
from ..errors import ProgramError
from ..schemes import get_scheme
from ..types import Dim, DType, TensorType
from .base import (
    AttrKind,
    Attrs,
    AttrSpec,
    Kind,
    Op,
    Outputs,
    Types,
    int_attr,
    is_token_dim,
    need_int,
    need_shape,
    tensor,
)
from .quantized import SCHEME, check_matrix

if TYPE_CHECKING:
    import torch


def _embedding(types: Types, attrs: Attrs) -> Outputs:
    table = tensor(types, 0, 2, "table")
    ids = need_int(tensor(types, 1), "ids")
    return (TensorType(table.dtype, (*ids.shape, table.shape[1])),)


def _embedding_meaning(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return table[ids.long()]


def _embedding_mixes(types: Types, outs: Outputs, attrs: Attrs, token: str) -> str | None:
    if is_token_dim(tensor(types, 0).shape[0], token):
        return "looks up rows of other tokens"
    return None


def _scaled_embedding(types: Types, attrs: Attrs) -> Outputs:
    table, scale = tensor(types, 0, 2, "table"), tensor(types, 1, name="table_scale")
    ids = need_int(tensor(types, 2), "ids")
    width, dtype = int_attr(attrs, "width"), DType(attrs["dtype"])
    if width < 1:
        raise ProgramError(f"width is {width}, expected at least 1")
    check_matrix(table, scale, width, attrs, "table")
    if not dtype.is_float:
        raise ProgramError(f"dtype is {dtype.value}, expected floating point")
    return (TensorType(dtype, (*ids.shape, width)),)


def _code_depths(types: Types, attrs: Attrs) -> Mapping[int, Dim]:
    return {0: int_attr(attrs, "width")}


def scaled_embedding_meaning(
    table: torch.Tensor,
    table_scale: torch.Tensor,
    ids: torch.Tensor,
    *,
    dtype: str,
    scheme: str,
    width: int,
) -> torch.Tensor:
    """Rows `ids[..]` of the matrix `[V, width]` that codes and their scales stand for.

    Only these rows are decoded (`Format.decode_rows`), in the type of the scales, and rounded to
    `dtype` at the end.
    """
    from ..torch_types import to_torch

    values = get_scheme(scheme).weight.decode_rows(table, table_scale, ids.long(), width)
    return values.to(to_torch(DType(dtype)))


def _take(types: Types, attrs: Attrs) -> Outputs:
    kind, dim = tensor(types, 0), int_attr(attrs, "dim")
    index = need_int(tensor(types, 1), "index")
    shape = (*kind.shape[:dim], *index.shape, *kind.shape[dim + 1 :])
    return (TensorType(kind.dtype, shape),)


def _take_meaning(x: torch.Tensor, index: torch.Tensor, *, dim: int) -> torch.Tensor:
    rows = x.index_select(dim, index.reshape(-1).long())
    return rows.reshape(*x.shape[:dim], *index.shape, *x.shape[dim + 1 :])


def _take_mixes(types: Types, outs: Outputs, attrs: Attrs, token: str) -> str | None:
    if is_token_dim(tensor(types, 0).shape[int_attr(attrs, "dim")], token):
        return "takes rows of other tokens"
    return None


def _check_index(types: Types, attrs: Attrs) -> tuple[TensorType, TensorType]:
    """x and index, which differ along `dim` alone."""
    kind, dim = tensor(types, 0), int_attr(attrs, "dim")
    index = need_int(tensor(types, 1, kind.rank, "index"), "index")
    need_shape(index, (*kind.shape[:dim], index.shape[dim], *kind.shape[dim + 1 :]), "index")
    return kind, index


def _gather(types: Types, attrs: Attrs) -> Outputs:
    kind, index = _check_index(types, attrs)
    return (TensorType(kind.dtype, index.shape),)


def _gather_meaning(x: torch.Tensor, index: torch.Tensor, *, dim: int) -> torch.Tensor:
    return x.gather(dim, index.long())


def _scatter(types: Types, attrs: Attrs) -> Outputs:
    return (_check_index(types, attrs)[0],)


def _scatter_meaning(
    x: torch.Tensor, index: torch.Tensor, *, dim: int, value: float
) -> torch.Tensor:
    return x.scatter(dim, index.long(), value)


def _rows_cost(types: Types, outs: Outputs, attrs: Attrs, bindings: Mapping[str, int]) -> Cost:
    """Only the rows picked are read, not the whole table."""
    moved = outs[0].num_bytes(bindings)
    return Cost(moved + tensor(types, 1).num_bytes(bindings), moved, 0)


def _scaled_rows_cost(
    types: Types, outs: Outputs, attrs: Attrs, bindings: Mapping[str, int]
) -> Cost:
    """Only the codes and scales of the rows picked are read; each element is scaled once."""
    codes, ids = tensor(types, 0), tensor(types, 2)
    kinds = (codes, tensor(types, 1))
    row = sum(TensorType(k.dtype, k.shape[1:]).num_bytes(bindings) for k in kinds)
    read = ids.num_elements(bindings) * row + ids.num_bytes(bindings)
    return Cost(read, outs[0].num_bytes(bindings), outs[0].num_elements(bindings))


OPS = (
    Op(
        "embedding",
        Kind.GATHER,
        "Row `ids` of `table`: table[V, H], ids[..] -> [.., H].",
        ("table", "ids"),
        _embedding,
        _embedding_meaning,
        cost_rule=_rows_cost,
        mixes=_embedding_mixes,
    ),
    Op(
        "scaled_embedding",
        Kind.GATHER,
        "Row `ids` of the table [V, width] that codes and scales table_scale[V] stand for under "
        "`scheme`: ids[..] -> [.., width] of `dtype`. Numbers are decoded in float32 (scale of the "
        "group times level, plus minimum, times scale of the row) and rounded once. In fp8-block, "
        "table_scale[ceil(V / 128), ceil(width / 128)] has the scales.",
        ("table", "table_scale", "ids"),
        _scaled_embedding,
        scaled_embedding_meaning,
        (AttrSpec("dtype", AttrKind.DTYPE), SCHEME, AttrSpec("width", AttrKind.INT)),
        cost_rule=_scaled_rows_cost,
        mixes=_embedding_mixes,
        code_depths=_code_depths,
    ),
    Op(
        "take",
        Kind.GATHER,
        "Rows `index` of x along `dim`; the index's shape replaces that dimension.",
        ("x", "index"),
        _take,
        _take_meaning,
        (AttrSpec("dim", AttrKind.AXIS, 0),),
        cost_rule=_rows_cost,
        mixes=_take_mixes,
    ),
    Op(
        "gather",
        Kind.GATHER,
        "Elements `index` of x along `dim`, each from its own row: index[.., K] of x[.., N] -> "
        "[.., K] where `dim` is the last.",
        ("x", "index"),
        _gather,
        _gather_meaning,
        (AttrSpec("dim", AttrKind.AXIS),),
        cost_rule=_rows_cost,
        mixes=_take_mixes,
    ),
    Op(
        "scatter",
        Kind.GATHER,
        "x with `value` stored at positions `index` along `dim`, separately in each row.",
        ("x", "index"),
        _scatter,
        _scatter_meaning,
        (AttrSpec("dim", AttrKind.AXIS), AttrSpec("value", AttrKind.FLOAT)),
        mixes=_take_mixes,
    ),
)
