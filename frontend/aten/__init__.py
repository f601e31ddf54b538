"""One small converter for each ATen overload that capture can produce, by family."""

from __future__ import annotations

from . import captured, creation, matrix, pointwise, reductions, views
from .base import Converter

CONVERTERS: dict[str, Converter] = {
    **pointwise.CONVERTERS,
    **views.CONVERTERS,
    **reductions.CONVERTERS,
    **matrix.CONVERTERS,
    **creation.CONVERTERS,
    **captured.CONVERTERS,
}
