"""How each op becomes launches: one file a family, one table of all."""

from __future__ import annotations

from ..emitter import Lowering
from . import attention, coded, experts, gather, matrix, norms, views

LOWERINGS: dict[str, Lowering] = {
    **matrix.LOWERINGS,
    **norms.LOWERINGS,
    **attention.LOWERINGS,
    **gather.LOWERINGS,
    **views.LOWERINGS,
    **coded.LOWERINGS,
    **experts.LOWERINGS,
}
"""Op name -> lowering, for the ops that the loops of `loops.py` do not take."""
