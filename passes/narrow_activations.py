"""Keeps values that products round to 16 bits anyway, and gates, in 16 bits between ops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final

from ..ir.builder import ProgramBuilder
from ..ir.program import Attr, Node, Operand, Program, Value
from ..ir.types import DType, TensorType
from .base import Pass, PassContext, PassResult, finish
from .merge_linears import PRODUCTS

_NARROW: Final = DType.BF16
"""float16 is left out: a gate, or what it is multiplied by, may exceed its largest number."""
_MAKERS: Final = frozenset(
    {"rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "gated_act"}
)
"""Ops whose first result can be of a type of its own."""


@dataclass(frozen=True)
class NarrowActivations(Pass):
    """`%m = linear(%x, @gate_up); %g = gated_act(%m); linear(%g, @down)` =>
    `%m = linear(%x, @gate_up) {dtype = bf16}; %g = gated_act(%m) {dtype = bf16};
    linear(%g, @down) {dtype = f32}`.

    Applies to models whose recipe chose bfloat16. Results of norms and gated activations become
    bfloat16 if all their readers are products by bfloat16 matrices, which round them anyway. So do
    products that only a gated activation reads.

    Requires: unit-batch-squeezed. Ensures: nothing more.
    Keeps: reassociates: gates, and what they are multiplied by, are rounded to bfloat16.
    Why: gates are the widest rows of a layer. Those of a prompt do not fit into the caches, so the
    product that makes them, and what reads them, is faster with half of the bytes.
    """

    name: ClassVar[str] = "narrow-activations"
    phase: ClassVar[str] = "fuse"
    contract: ClassVar[str] = "reassociates"
    requires: ClassVar[frozenset[str]] = frozenset({"unit-batch-squeezed"})

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Narrow what can be, and say of its readers what type their results keep."""
        if program.spec.dtype != _NARROW.value:
            return finish(program, program, 0)
        readers = program.consumers()
        types = dict[int, DType]()
        for product, gated in _gates(program, readers):
            types[id(product)] = _NARROW
            types[id(gated)] = DType.F32
        matches = len(types) // 2
        for node in program.nodes:
            if node.op not in _MAKERS or node.outputs[0].type.dtype is not DType.F32:
                continue
            following = readers.get(node.outputs[0].name, ())
            if _all_round(program, node.outputs[0], following):
                matches += id(node) not in types
                types[id(node)] = _NARROW
                for reader in following:
                    types.setdefault(id(reader), reader.output.type.dtype)
        builder = ProgramBuilder.from_program(program)
        for node in program.nodes:
            dtype = types.get(id(node))
            if dtype is None:
                builder.copy(node)
                continue
            attrs: Mapping[str, Attr] = {**node.attrs, "dtype": dtype.value}
            builder.copy(replace(node, attrs=attrs), reinfer=True)
        return finish(program, builder.build(), matches)


def _gates(program: Program, readers: Mapping[str, Sequence[Node]]) -> Iterator[tuple[Node, Node]]:
    """Each product with float32 results that a gated activation reads, and nothing else does."""
    producers = program.producers()
    for node in program.nodes:
        if node.op != "gated_act":
            continue
        (rows,) = node.values()
        product = producers.get(rows.name)
        if product is None or product.op not in PRODUCTS or rows.type.dtype is not DType.F32:
            continue
        if rows not in program.outputs and len(readers[rows.name]) == 1:
            yield product, node


def _all_round(program: Program, value: Value, readers: Sequence[Node]) -> bool:
    """Whether whatever reads a value rounds it to the narrow type first."""
    return (
        bool(readers)
        and value not in program.outputs
        and all(
            node.op == "linear"
            and value not in node.inputs[1:]
            and _dtype(program, node.inputs[1]) is _NARROW
            for node in readers
        )
    )


def _dtype(program: Program, operand: Operand) -> DType | None:
    kind = program.operand_type(operand)
    return kind.dtype if isinstance(kind, TensorType) else None
