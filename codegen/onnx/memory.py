"""How much memory the values of a step take at most."""

from __future__ import annotations

from collections.abc import Iterable

from ...ir.program import Program, Weight
from ...ir.types import DType, TensorType
from .types import computed, is_narrow


def widened_bytes(weights: Iterable[Weight]) -> int:
    """What onnxruntime holds beside the weights as they are stored: those of 16 bits in 32."""
    narrow = (weight.type for weight in weights if is_narrow(weight.type.dtype))
    return sum(TensorType(DType.F32, kind.shape).num_bytes({}) for kind in narrow)


def step_bytes(program: Program) -> int:
    """The most bytes of values that are needed at the same time, at the greatest sizes.

    onnxruntime plans its own memory, and holds some values longer, others in place; what attention
    gathers comes on top.
    """
    sizes = {name: bound.high for name, bound in program.symbols.items()}
    last = {value.name: len(program.nodes) for value in program.outputs}
    for place, node in enumerate(program.nodes):
        for value in node.values():
            last[value.name] = max(last.get(value.name, 0), place)
    ends: dict[int, int] = {}
    live = most = 0
    for place, node in enumerate(program.nodes):
        for value in node.outputs:
            wide = TensorType(computed(value.type.dtype), value.type.shape)
            held = wide.num_bytes(sizes)
            live += held
            end = last.get(value.name, place)
            ends[end] = ends.get(end, 0) + held
        most = max(most, live)
        live -= ends.pop(place, 0)
    return most
