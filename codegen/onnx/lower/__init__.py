"""How each op is said in ONNX: one file a family."""

from __future__ import annotations

from typing import Final

from ..emitter import Lowering
from . import coded, experts, gather, matrix, norms, pointwise, position, reductions, views
from .attention import OPS as STATE_OPS

LOWERINGS: Final[dict[str, Lowering]] = {
    **pointwise.LOWERINGS,
    **views.LOWERINGS,
    **reductions.LOWERINGS,
    **gather.LOWERINGS,
    **matrix.LOWERINGS,
    **norms.LOWERINGS,
    **position.LOWERINGS,
    **experts.LOWERINGS,
    **coded.LOWERINGS,
}
"""Those of all ops but the ones on paged state, which depend on the form of the caches."""

LOWERED: Final = frozenset(LOWERINGS) | STATE_OPS
