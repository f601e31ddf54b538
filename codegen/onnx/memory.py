"""How much memory the values of a step take at most."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ...ir.program import Node, Program, Weight
from ...ir.resources import KvGroup
from ...ir.types import DType, TensorType
from .types import computed, is_narrow


def widened_bytes(weights: Iterable[Weight]) -> int:
    """What onnxruntime holds beside the weights as they are stored: those of 16 bits in 32."""
    narrow = (weight.type for weight in weights if is_narrow(weight.type.dtype))
    return sum(TensorType(DType.F32, kind.shape).num_bytes({}) for kind in narrow)


def step_bytes(program: Program) -> int:
    """The most bytes of values that are needed at the same time, at the greatest sizes.

    onnxruntime plans its own memory, and holds some values longer, others in place. What attention
    makes of them comes on top: `slots_bytes`.
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


def slots_bytes(program: Program, is_grouped: Callable[[Node, KvGroup], bool]) -> int:
    """The most bytes that attention over slots takes in one layer, beside values of the program.

    Each sequence has a row as long as the longest of the step, `Q`, over as many keys as the
    longest has, `K`: queries, results and new keys, twice because they are transposed; keys and
    values that are stored, and again without what is not; scores and a mask, for which it was
    measured to take up to twice their size. Layers that are grouped (`GroupQueryAttention`) read
    keys where they lie, and compute no scores of rows that are padded.
    """
    tokens, rows = (program.symbols[name].high for name in ("T", "R"))
    context = program.spec.max_context
    slots, queries = min(rows, tokens), min(tokens, context)
    groups = {one.name: one for one in program.resources if isinstance(one, KvGroup)}
    most = 0
    for node in program.nodes:
        if node.op != "paged_attention":
            continue
        group, kind = groups[str(node.attrs["group"])], program.operand_type(node.inputs[0])
        assert isinstance(kind, TensorType)
        heads = kind.shape[1]
        assert isinstance(heads, int)
        sizes = group.key_head_dim + group.value_head_dim
        padded = 2 * queries * (heads + group.num_kv_heads) * sizes
        stored = 2 * context * group.num_kv_heads * sizes
        scores = 2 * queries * context * (heads + 1)
        if is_grouped(node, group):
            most = max(most, slots * padded + 2 * tokens * context * heads)
        else:
            most = max(most, slots * (padded + stored + scores))
    return most * DType.F32.size_bytes
