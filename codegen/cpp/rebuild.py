"""Weights for another target, out of an artifact: panels of one size turned into panels of another.

Done with numpy, so that a machine without torch can do it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ir.errors import ArtifactError
from ...ir.program import Program, Weight
from ..base import Made
from .layout import BlockLayout, Layout, PanelLayout
from .packing import PACK, layout_of
from .weight_table import PACKED


def stored_weights(
    program: Program, before: Sequence[Weight], made: Made
) -> Callable[[Weight], NDArray[Any]]:
    """A source of weights as another target wants them, from those that were written `before`.

    It raises ArtifactError for a weight that cannot be had from what is there.
    """
    known = {weight.name: weight for weight in before}

    def give(weight: Weight) -> NDArray[Any]:
        old = known.get(weight.name)
        if old is not None and old.expr == weight.expr:
            return made.weights(weight.name)
        packed = old is not None and old.expr.op == weight.expr.op == PACK.name
        if old is None or not packed or old.expr.inputs != weight.expr.inputs:
            raise ArtifactError(
                f"the weight {weight.name} has a layout that cannot be converted",
                where=str(made.directory),
                hint="compile the model again for this target",
            )
        plain = program.weights[weight.name.removesuffix(PACKED)].type
        n, k = (int(str(dim)) for dim in plain.shape[-2:])
        layouts = layout_of(old.expr.attrs), layout_of(weight.expr.attrs)
        return repack(made.weights(weight.name), *layouts, (n, k))

    return give


def repack(packed: NDArray[Any], old: Layout, new: Layout, shape: tuple[int, int]) -> NDArray[Any]:
    """The panels `new.pack(w)` of a weight `w` `[.., *shape]`, given `old.pack(w)`."""
    n, k = shape
    if isinstance(old, BlockLayout):
        assert isinstance(new, BlockLayout), "a target changes sizes, not the kind of codes"
        return new.pack_array(old.unpack_array(packed, n))
    assert isinstance(new, PanelLayout), "a target changes sizes, not the kind of codes"
    *lead, panels, steps, nr, kp = packed.shape
    rows = packed.swapaxes(-3, -2).reshape(*lead, panels * nr, steps * kp)[..., :n, :k]
    panels, steps, nr, kp = new.packed_shape((n, k))
    padded = np.zeros((*lead, panels * nr, steps * kp), packed.dtype)
    padded[..., :n, :k] = _flip(rows, old)
    tiles = padded.reshape(*lead, panels, nr, steps, kp).swapaxes(-3, -2)
    return np.ascontiguousarray(_flip(tiles, new))


def _flip(codes: NDArray[Any], layout: PanelLayout) -> NDArray[Any]:
    return codes ^ codes.dtype.type(-128) if layout.flipped else codes
