"""The weight op `pack`: a matrix in the panels that the kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...ir.errors import ProgramError
from ...ir.formats import get_format
from ...ir.ops.base import Attrs
from ...ir.types import TensorType
from ...ir.weights import WeightOp, register_weight_op
from .layout import BlockLayout, Layout, PanelLayout

if TYPE_CHECKING:
    import torch


def layout_of(attrs: Attrs) -> Layout:
    """The layout that the constants of an expression `pack` name."""
    nr, kp, form = attrs["nr"], attrs.get("kp", 4), attrs.get("format")
    if not isinstance(nr, int) or not isinstance(kp, int) or nr < 1 or kp < 1:
        raise ProgramError(f"pack: nr and kp are sizes, not {nr!r} and {kp!r}")
    flipped = attrs.get("flipped") is True
    if form is not None:
        return BlockLayout(nr, get_format(form), kp, flipped)
    return PanelLayout(nr, kp, flipped)


def _pack(parts: Sequence[torch.Tensor], attrs: Attrs) -> torch.Tensor:
    return layout_of(attrs).pack(parts[0])


def _packed_type(kinds: Sequence[TensorType], attrs: Attrs) -> TensorType:
    return layout_of(attrs).packed_type(kinds[0])


PACK = register_weight_op(WeightOp("pack", _pack, _packed_type, ("nr",)))
"""Registered once, when the backend is imported."""
