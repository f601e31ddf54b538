"""Turns whatever depends on positions alone into angles of rotary embeddings, or into a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..ir.builder import ProgramBuilder, remove_dead_code
from ..ir.errors import PassError
from ..ir.interpret import describe
from ..ir.ops import Kind, get_op
from ..ir.program import Attr, Node, Operand, Program, Value
from .base import Pass, PassContext, PassResult, finish
from .constants import ConstantTable
from .match import adopt_name
from .position_nodes import PositionNodes, Repeat, RotaryAngles, distinct, find_angles

if TYPE_CHECKING:
    import torch

POSITIONS = "positions"
"""The input that holds each token's position."""


@dataclass(frozen=True)
class FoldRotaryTables(Pass):
    """`%c = cos(mul(reshape(%positions), @freq)) : f32[T, 64]` => `rotary(%positions, @freq)`.

    Requires: unit-batch-squeezed. Ensures: positions-folded.
    Keeps: every bit, for each position below the context limit. What is no scaled sine of the
    position times a frequency becomes a table that is looked up. Halves or neighbours that are
    equal are computed or stored once and joined again.
    Why: a table of 32768 positions of Gemma 3 would take 67 MB; a step computes its own rows once.
    """

    max_bytes: int = 1 << 30

    name: ClassVar[str] = "fold-rotary-tables"
    phase: ClassVar[str] = "canonicalize"
    requires: ClassVar[frozenset[str]] = frozenset({"unit-batch-squeezed"})
    ensures: ClassVar[frozenset[str]] = frozenset({"positions-folded"})

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Find the last values that depend on positions alone, and make tables of them."""
        positions = next((v for v in program.inputs if v.name == POSITIONS), None)
        length = program.spec.max_context
        if positions is None or length < 1:
            return finish(program, program, 0)
        found = PositionNodes(program, positions)
        folded = [value for value in found.tables() if self._worth(found, value)]
        if not folded:
            return finish(program, program, 0)
        for value in folded:
            if not _row_local(found, value, length):
                raise PassError(
                    f"{describe(found.producers[value.name])} mixes positions of different tokens",
                    where=self.name,
                )
        angles = find_angles(found, folded, length)
        tables = self._tables(found, [v for v in folded if v.name not in angles], length)
        builder = ProgramBuilder.from_program(program)
        constants = ConstantTable(builder)
        for node in program.nodes:
            name = node.outputs[0].name if node.outputs else None
            if name in angles:
                _compute(builder, constants, node, positions, angles[name])
            elif name in tables:
                _look_up(builder, constants, node, positions, tables[name])
            else:
                builder.copy(node)
        return finish(program, remove_dead_code(builder.build()), len(folded))

    def _tables(
        self, found: PositionNodes, values: list[Value], length: int
    ) -> dict[str, torch.Tensor]:
        """The rows of these values for every position, by name."""
        if not values:
            return {}
        total = sum(length * value.type.num_bytes({"T": 1}) for value in values)
        if total > self.max_bytes:
            raise PassError(
                f"position tables for {length} tokens take {total >> 20} MiB",
                where=self.name,
                hint="lower runtime.max_context",
            )
        rows = found.at(range(length))
        return {value.name: rows[value.name] for value in values}

    def _worth(self, found: PositionNodes, value: Value) -> bool:
        """A table that is looked up already, or a mere cast of positions, stays."""
        return any(
            get_op(node.op).kind is Kind.POINTWISE and node.op != "cast"
            for node in found.cone(value)
        )


def _row_local(found: PositionNodes, value: Value, length: int) -> bool:
    """Whether a few positions in another order and company give the same rows."""
    import torch

    some = [length - 1, 0, length // 2, length // 3, min(17, length - 1)]
    together = found.at(some)[value.name]
    alone = [found.at([position])[value.name] for position in some]
    return torch.equal(together, torch.cat(alone))


def _compute(
    builder: ProgramBuilder,
    constants: ConstantTable,
    node: Node,
    positions: Value,
    angles: RotaryAngles,
) -> None:
    """Emit the angles under the name of the value they replace."""
    frequencies = constants.add("frequencies", angles.frequencies)
    attrs: dict[str, Attr] = {"function": angles.function, "scale": angles.scale}
    _emit_rows(builder, node, angles.repeat, "rotary", (positions, frequencies), attrs)


def _look_up(
    builder: ProgramBuilder, constants: ConstantTable, node: Node, positions: Value, rows: Any
) -> None:
    """Emit the look-up of one table under the name of the value it replaces."""
    repeat, stored = distinct(rows)
    table = constants.add(f"table.{node.op}", stored)
    _emit_rows(builder, node, repeat, "embedding", (table, positions), {})


def _emit_rows(
    builder: ProgramBuilder,
    node: Node,
    repeat: Repeat,
    op: str,
    inputs: tuple[Operand, ...],
    attrs: Mapping[str, Attr],
) -> None:
    """Emit the op that gives the distinct elements of each row, and join them to whole rows."""
    mark = len(builder.nodes)
    value = node.output
    width = value.type.shape[1]
    assert isinstance(width, int)

    def emit(op: str, *inputs: Operand, **attrs: Attr) -> Value:
        hint = f"{value.name}.{op}"
        made = builder.add(op, inputs, attrs, names=(hint,), layer=node.layer, source=node.source)
        return made.output

    result = emit(op, *inputs, **attrs)
    if repeat == "halves":
        result = emit("concat", result, result, dim=1)
    elif repeat == "neighbours":
        column = emit("reshape", result, shape=("T", width // 2, 1))
        pairs = emit("concat", column, column, dim=2)
        result = emit("reshape", pairs, shape=("T", width))
    adopt_name(builder, mark, value, result)
