"""Computes at compile time what depends on nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..ir.builder import ProgramBuilder, remove_dead_code
from ..ir.program import Literal, Node, Program, Value
from ..ir.types import Sym
from .base import Pass, PassContext, PassResult, finish
from .constants import ConstantTable, evaluate_nodes, literal_of, reads_constants_only

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FoldConstants(Pass):
    """`%1 = iota() {size = 4}; %2 = mul(%1, 2)` => the weight `@const = data{...} : i64[4]`.

    Requires: nothing. Ensures: nothing that a pass relies on.
    Keeps: every bit: it runs the ops' meanings, in the program's own element types.
    Why: otherwise, every step would recompute inverse frequencies, masks and scales.
    """

    max_bytes: int = 1 << 20

    name: ClassVar[str] = "fold-constants"
    phase: ClassVar[str] = "canonicalize"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Evaluate every constant node; those read by other nodes become weights or literals."""
        foldable: dict[str, Node] = {}
        order: list[Node] = []
        for node in program.nodes:
            if self._foldable(program, node, foldable):
                order.append(node)
                foldable.update((value.name, node) for value in node.outputs)
        if not order:
            return finish(program, program, 0)
        values = evaluate_nodes(program, order, {}, 1)
        return finish(program, self._rebuild(program, foldable, values), len(order))

    def _foldable(self, program: Program, node: Node, known: dict[str, Node]) -> bool:
        for value in node.outputs:
            if any(isinstance(dim, Sym) for dim in value.type.shape):
                return False
            if value.type.num_bytes() > self.max_bytes or value in program.outputs:
                return False
        # Symbols may also stand in attributes (a slice of a constant by T).
        if any(isinstance(a, str) and not a.isidentifier() for a in node.attrs.values()):
            return False
        if node.op == "slice" and not all(
            isinstance(node.attrs[edge], int) for edge in ("start", "stop")
        ):
            return False
        return reads_constants_only(program, node, lambda value: value.name in known)

    def _rebuild(
        self, program: Program, folded: dict[str, Node], values: dict[str, torch.Tensor]
    ) -> Program:
        builder = ProgramBuilder.from_program(program)
        table = ConstantTable(builder)
        for node in program.nodes:
            if all(value.name in folded for value in node.outputs) and node.outputs:
                continue
            for value in node.values():
                if value.name in folded:
                    builder.replace(value, _constant(table, value, values[value.name]))
            builder.copy(node)
        return remove_dead_code(builder.build())


def _constant(table: ConstantTable, value: Value, tensor: torch.Tensor) -> Literal:
    if not value.type.shape:
        return literal_of(tensor)
    return table.add("const", tensor)  # type: ignore[return-value]
