"""How each op becomes calls: one file a family, one table of all."""

from __future__ import annotations

from ..emitter import Lowering
from . import attention, experts, gather, matrix, norms, quantized, views

LOWERINGS: dict[str, Lowering] = {
    **matrix.LOWERINGS,
    **quantized.LOWERINGS,
    **norms.LOWERINGS,
    **attention.LOWERINGS,
    **gather.LOWERINGS,
    **views.LOWERINGS,
    **experts.LOWERINGS,
}
"""Op name -> lowering, for the ops that the fused loops of `loops.py` do not take."""
