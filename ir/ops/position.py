"""Rotary position embedding from tables of cosines and sines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import ProgramError
from ..types import TensorType, evaluate_dim
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
    need_float,
    need_int,
    need_shape,
    tensor,
    wide,
)

if TYPE_CHECKING:
    import torch


def check_tables(x: TensorType, cos: TensorType, sin: TensorType, attrs: Attrs) -> None:
    """ProgramError unless the tables fit a head of x and `rotary_dim`."""
    rotary = int_attr(attrs, "rotary_dim")
    head = x.shape[-1]
    if rotary < 2 or rotary % 2 or not isinstance(head, int) or rotary > head:
        raise ProgramError(f"rotary_dim {rotary} does not fit heads of size {head}")
    need_float(cos, "cos")
    if cos.shape[1] != rotary // 2:
        raise ProgramError(f"cos is {cos}, expected [P, {rotary // 2}]")
    if sin != cos:
        raise ProgramError(f"sin is {sin}, cos is {cos}")


def _rope(types: Types, attrs: Attrs) -> Outputs:
    x = need_float(tensor(types, 0, 3, "x"), "x")
    need_shape(need_int(tensor(types, 1, 1, "positions"), "positions"), x.shape[:1], "positions")
    check_tables(x, tensor(types, 2, 2, "cos"), tensor(types, 3, 2, "sin"), attrs)
    return (x,)


def rope_meaning(
    x: torch.Tensor,
    positions: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    style: str,
    rotary_dim: int,
) -> torch.Tensor:
    """Pairs of elements of each head turned by their angle, in float32, rounded once."""
    import torch

    rows = positions.long()
    value = wide(x[..., :rotary_dim])
    c, s = (table[rows].to(value.dtype)[:, None, :] for table in (cos, sin))  # [T, 1, D'/2]
    if style == "half":
        a, b = value[..., : rotary_dim // 2], value[..., rotary_dim // 2 :]
        turned = torch.cat([a * c - b * s, b * c + a * s], -1)
    else:
        a, b = value[..., 0::2], value[..., 1::2]
        turned = torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., rotary_dim:]], -1)


def rope_cost(types: Types, outs: Outputs, attrs: Attrs, bindings: Mapping[str, int]) -> Cost:
    """x and the tokens' rows of the tables are read; three operations an element turned."""
    x, positions, cos, sin = (tensor(types, i) for i in range(4))
    tokens = evaluate_dim(positions.shape[0], bindings)
    rows = sum(TensorType(table.dtype, table.shape[1:]).num_bytes() for table in (cos, sin))
    read = x.num_bytes(bindings) + positions.num_bytes(bindings) + tokens * rows
    heads = TensorType(x.dtype, x.shape[:-1]).num_elements(bindings)
    turned = heads * int_attr(attrs, "rotary_dim")
    return Cost(read, sum(kind.num_bytes(bindings) for kind in outs), 3 * turned)


ROPE_ATTRS = (
    AttrSpec("style", AttrKind.STR, "half", ("half", "interleaved")),
    AttrSpec("rotary_dim", AttrKind.INT),
)

OPS = (
    Op(
        "rope",
        Kind.POSITION,
        "x[T, H, D] with pairs of its first `rotary_dim` elements rotated by the angle of "
        "positions[T], from cos and sin [P, rotary_dim / 2]. `half` pairs i with "
        "i + rotary_dim / 2, `interleaved` 2i with 2i + 1. Computed in float32, rounded once.",
        ("x", "positions", "cos", "sin"),
        _rope,
        rope_meaning,
        ROPE_ATTRS,
        cost_rule=rope_cost,
    ),
)
