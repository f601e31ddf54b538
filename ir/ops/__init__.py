"""The dialect: one file a family; this list is the only place that registers ops."""

from ..cost import Cost
from . import (
    attention,
    creation,
    experts,
    fused,
    gather,
    matrix,
    norms,
    pointwise,
    position,
    quantized,
    reductions,
    state,
    views,
)
from .base import PHASES, Kind, Op, all_ops, get_op, register_family, register_op

__all__ = ["PHASES", "Cost", "Kind", "Op", "all_ops", "get_op", "register_op"]

_FAMILIES = (
    pointwise.OPS,
    views.OPS,
    reductions.OPS,
    gather.OPS,
    creation.OPS,
    matrix.OPS,
    norms.OPS,
    position.OPS,
    attention.OPS,
    state.OPS,
    fused.OPS,
    experts.OPS,
    quantized.OPS,
)

for _family in _FAMILIES:
    register_family(_family)
