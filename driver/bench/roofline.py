"""The roofline: the time that a step must take where this machine is at its ceilings.

A node waits for memory or for the processor, whichever takes longer; nodes run one after another.
What counts as memory is what no cache holds from step to step: weights, and the paged state. What
nodes hand on to each other is left out, so that a fusion cannot make the bound worse. A model that
fits into the caches as a whole is faster than that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from ...ir.analyses import node_label, token_bytes
from ...ir.ops import Kind, get_op
from ...ir.ops.base import PagedLoad
from ...ir.program import Node, Program, Value, WeightRef
from ...ir.schemes import get_scheme
from ...ir.types import DType, TensorType
from .ceilings import Ceilings

ProductKind = Literal["fp32", "bf16", "int8"]

_PRODUCTS = frozenset({Kind.MATRIX, Kind.EXPERTS, Kind.ATTENTION, Kind.STATE})
_CODES = frozenset({DType.I8, DType.U8})


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step computes: tokens, rows of logits, and its sequences by what each has.

    `sequences` counts pairs of queries in the step and tokens stored once it has run.
    """

    tokens: int
    rows: int
    sequences: Mapping[tuple[int, int], int]

    @classmethod
    def of(cls, sequences: Iterable[tuple[int, int]], rows: int | None = None) -> StepShape:
        """The shape of these sequences; by default each wants one row of logits."""
        counts = Counter(sequences)
        tokens = sum(queries * count for (queries, _), count in counts.items())
        return cls(tokens, counts.total() if rows is None else rows, counts)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a node asks of the machine: bytes of memory, and operations of one kind."""

    num_bytes: int
    operations: int
    kind: ProductKind

    def seconds(self, ceilings: Ceilings) -> float:
        """The time that it takes at these ceilings."""
        rate: float = getattr(ceilings, self.kind)
        return max(self.num_bytes / ceilings.read, self.operations / rate)


def node_demand(program: Program, node: Node, shape: StepShape) -> Demand:
    """What one node asks of the machine in a step of this shape."""
    op = get_op(node.op)
    types = [program.operand_type(operand) for operand in node.inputs]
    outs = op.infer(types, node.attrs)
    bounds = {name: bound.high for name, bound in program.symbols.items()}
    sizes = {"T": shape.tokens, "R": shape.rows, "B": sum(shape.sequences.values())}
    cost = op.cost_rule(types, outs, node.attrs, bounds | sizes)
    handed = sum(v.type.num_bytes(bounds | sizes) for v in node.inputs if isinstance(v, Value))
    num_bytes, operations = max(0, cost.bytes_read - handed), cost.flops
    if op.paged_cost is not None:
        stored = token_bytes(program, node)
        for (queries, context), count in shape.sequences.items():
            load = PagedLoad(1, context, stored)
            own = bounds | sizes | {"T": queries, "B": 1}
            paged = op.paged_cost(types, outs, node.attrs, own, load)
            num_bytes += count * (paged.bytes_read + paged.bytes_written)
            operations += count * paged.flops
    return Demand(num_bytes, operations, product_kind(program, node))


def product_kind(program: Program, node: Node) -> ProductKind:
    """What a node multiplies: codes or bfloat16 where its matrices are, else floats.

    Where rows are not quantized, codes are multiplied as floats.
    """
    if get_op(node.op).kind not in _PRODUCTS:
        return "fp32"
    weights = [program.weights[ref.name].type for ref in node.inputs if isinstance(ref, WeightRef)]
    if any(kind.dtype in _CODES for kind in weights):
        scheme = node.attrs.get("scheme")
        is_decoded = scheme is not None and get_scheme(scheme).activations is None
        return "fp32" if is_decoded else "int8"
    types = [*weights, program.operand_type(node.inputs[0])]
    narrow = any(isinstance(kind, TensorType) and kind.dtype is DType.BF16 for kind in types)
    return "bf16" if narrow else "fp32"


class Roofline:
    """A program at the ceilings of a machine: equal nodes of different layers are counted once."""

    def __init__(self, program: Program, ceilings: Ceilings) -> None:
        self._program, self._ceilings = program, ceilings
        self._signature = {node_label(node): _signature(program, node) for node in program.nodes}
        self._counts = Counter(self._signature.values())
        self._members = {self._signature[node_label(node)]: node for node in program.nodes}

    def step_seconds(self, shape: StepShape) -> float:
        """The time of a whole step."""
        times = self._times(shape)
        return sum(times[one] * count for one, count in self._counts.items())

    def node_seconds(self, shape: StepShape) -> dict[str, float]:
        """The time of each node, by its label."""
        times = self._times(shape)
        return {label: times[one] for label, one in self._signature.items()}

    def _times(self, shape: StepShape) -> dict[object, float]:
        return {
            one: node_demand(self._program, node, shape).seconds(self._ceilings)
            for one, node in self._members.items()
        }


def _signature(program: Program, node: Node) -> object:
    """What two nodes have in common that ask the same: all but names, and the layer's number."""
    attrs = tuple((name, value) for name, value in node.attrs.items() if name != "layer")
    operands = tuple(
        (type(operand).__name__, program.operand_type(operand)) for operand in node.inputs
    )
    return node.op, operands, attrs
