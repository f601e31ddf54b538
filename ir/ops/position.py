"""Rotary position embedding: cosines and sines of each token, and the rotation by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..cost import Cost
from ..errors import ProgramError
from ..types import TensorType
from .base import (
    AttrKind,
    Attrs,
    AttrSpec,
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


def _rotary(types: Types, attrs: Attrs) -> Outputs:
    positions = need_int(tensor(types, 0, 1, "positions"), "positions")
    frequencies = need_float(tensor(types, 1, 1, "frequencies"), "frequencies")
    return (TensorType(frequencies.dtype, (positions.shape[0], frequencies.shape[0])),)


def _rotary_meaning(
    positions: torch.Tensor, frequencies: torch.Tensor, *, function: str, scale: float
) -> torch.Tensor:
    angles = positions.to(frequencies.dtype)[:, None] * frequencies
    return (angles.cos() if function == "cos" else angles.sin()) * scale


def check_rows(x: TensorType, cos: TensorType, sin: TensorType, attrs: Attrs) -> None:
    """ProgramError unless cosines and sines fit the tokens and a head of x, and `rotary_dim`."""
    rotary = int_attr(attrs, "rotary_dim")
    head = x.shape[-1]
    if rotary < 2 or rotary % 2 or not isinstance(head, int) or rotary > head:
        raise ProgramError(f"rotary_dim {rotary} does not fit heads of size {head}")
    need_shape(need_float(cos, "cos"), (x.shape[0], rotary // 2), "cos")
    if sin != cos:
        raise ProgramError(f"sin is {sin}, cos is {cos}")


def _rope(types: Types, attrs: Attrs) -> Outputs:
    x = need_float(tensor(types, 0, 3, "x"), "x")
    check_rows(x, tensor(types, 1, 2, "cos"), tensor(types, 2, 2, "sin"), attrs)
    return (x,)


def rope_meaning(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    style: str,
    rotary_dim: int,
) -> torch.Tensor:
    """Pairs of elements of each head turned by their angle, in float32, rounded once."""
    import torch

    value = wide(x[..., :rotary_dim])
    c, s = (rows.to(value.dtype)[:, None, :] for rows in (cos, sin))  # [T, 1, D'/2]
    if style == "half":
        a, b = value[..., : rotary_dim // 2], value[..., rotary_dim // 2 :]
        turned = torch.cat([a * c - b * s, b * c + a * s], -1)
    else:
        a, b = value[..., 0::2], value[..., 1::2]
        turned = torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)
    return torch.cat([turned.to(x.dtype), x[..., rotary_dim:]], -1)


def rope_cost(types: Types, outs: Outputs, attrs: Attrs, bindings: Mapping[str, int]) -> Cost:
    """x and the angles are read; three operations an element turned."""
    x, cos, sin = (tensor(types, i) for i in range(3))
    read = sum(kind.num_bytes(bindings) for kind in (x, cos, sin))
    heads = TensorType(x.dtype, x.shape[:-1]).num_elements(bindings)
    turned = heads * int_attr(attrs, "rotary_dim")
    return Cost(read, sum(kind.num_bytes(bindings) for kind in outs), 3 * turned)


ROPE_ATTRS = (
    AttrSpec("style", AttrKind.STR, "half", ("half", "interleaved")),
    AttrSpec("rotary_dim", AttrKind.INT),
)

OPS = (
    Op(
        "rotary",
        Kind.POSITION,
        "`scale` times the cosine or the sine (`function`) of positions[T] times frequencies[N], "
        "as [T, N]. Angles are rounded to the element type of the frequencies.",
        ("positions", "frequencies"),
        _rotary,
        _rotary_meaning,
        (
            AttrSpec("function", AttrKind.STR, choices=("cos", "sin")),
            AttrSpec("scale", AttrKind.FLOAT, 1.0),
        ),
    ),
    Op(
        "rope",
        Kind.POSITION,
        "x[T, H, D] with pairs of its first `rotary_dim` elements rotated by the angles of their "
        "token, from cos and sin [T, rotary_dim / 2]. `half` pairs i with i + rotary_dim / 2, "
        "`interleaved` 2i with 2i + 1. Computed in float32, rounded once.",
        ("x", "cos", "sin"),
        _rope,
        rope_meaning,
        ROPE_ATTRS,
        cost_rule=rope_cost,
    ),
)
