"""The roofline: the time that a step must take where a machine is at its ceilings.

A node waits for memory or for the processor, whichever takes longer; nodes run one after another.
What counts as memory is what no cache holds from step to step: weights, and the paged state. What
nodes hand on to each other is left out, so that a fusion cannot make the bound worse. A model that
fits into the caches as a whole is faster than that.

Williams, Waterman and Patterson: Roofline: An Insightful Visual Performance Model for Multicore
Architectures. Communications of the ACM 52(4), 2009.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from .analyses import node_label, token_bytes
from .cost import OPERATION_KINDS, Cost, OperationKind, PagedLoad
from .ops import get_op
from .program import Node, Program, Value
from .sizes import format_count


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What so many threads of a machine do at best, all together.

    Bytes a second read from memory; operations a second of products and sums, with the widest
    instructions that kernels of this machine's target use (where it has none for bf16: fp32's).
    `threads` is 0 for a GPU.
    """

    threads: int
    read: float
    fp32: float
    bf16: float
    int8: float

    def rate(self, kind: OperationKind) -> float:
        """Operations a second of one kind."""
        rate: float = getattr(self, kind)
        return rate

    def seconds(self, cost: Cost) -> float:
        """The time that a cost takes: of its bytes, or of its operations."""
        computing = sum(cost.operations(kind) / self.rate(kind) for kind in OPERATION_KINDS)
        return max((cost.bytes_read + cost.bytes_written) / self.read, computing)

    def describe(self) -> str:
        """For people: "35.0 GB/s read; fp32 195, bf16 445, int8 908 Gop/s (2 threads)"."""
        rates = ", ".join(f"{kind} {self.rate(kind) / 1e9:.0f}" for kind in OPERATION_KINDS)
        threads = f" ({format_count(self.threads, 'thread')})" if self.threads else ""
        return f"{self.read / 1e9:.1f} GB/s read; {rates} Gop/s{threads}"


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


def uncached_cost(program: Program, node: Node, shape: StepShape) -> Cost:
    """What one node needs in a step of this shape, without the bytes that caches hold.

    Bytes are those of weights and of paged state; operations are all.
    """
    op = get_op(node.op)
    types = [program.operand_type(operand) for operand in node.inputs]
    bounds = {name: bound.high for name, bound in program.symbols.items()}
    sizes = {"T": shape.tokens, "R": shape.rows, "B": sum(shape.sequences.values())}
    own = op.cost(types, node.attrs, bounds | sizes)
    handed = sum(v.type.num_bytes(bounds | sizes) for v in node.inputs if isinstance(v, Value))
    total = replace(own, bytes_read=max(0, own.bytes_read - handed), bytes_written=0)
    if op.paged_cost is not None:
        stored = token_bytes(program, node)
        for (queries, context), count in shape.sequences.items():
            load = PagedLoad(1, context, stored)
            alone = bounds | sizes | {"T": queries, "B": 1}
            total += op.cost_in_pages(types, node.attrs, alone, load).times(count)
    return total


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
            one: self._ceilings.seconds(uncached_cost(self._program, node, shape))
            for one, node in self._members.items()
        }


def _signature(program: Program, node: Node) -> object:
    """What two nodes have in common that ask the same: all but names, and the layer's number."""
    attrs = tuple(
        (name, value) for name, value in node.attrs.items() if name not in ("layer", "cache")
    )
    operands = tuple(
        (type(operand).__name__, program.operand_type(operand)) for operand in node.inputs
    )
    return node.op, operands, attrs
