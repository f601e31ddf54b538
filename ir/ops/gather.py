"""Ops that pick rows or elements by index, and that put a number where an index says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..types import TensorType
from .base import (
    AttrKind,
    Attrs,
    AttrSpec,
    Cost,
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
