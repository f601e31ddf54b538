"""Turns whatever depends on positions alone into a table that is looked up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..ir.builder import ProgramBuilder, remove_dead_code
from ..ir.errors import PassError
from ..ir.interpret import describe
from ..ir.ops import Kind, get_op
from ..ir.ops.base import is_token_dim
from ..ir.program import Node, Program, Value
from ..ir.types import Sym
from .base import Pass, PassContext, PassResult, finish
from .constants import ConstantTable, evaluate_nodes, reads_constants_only
from .match import adopt_name

if TYPE_CHECKING:
    import torch

POSITIONS = "positions"
"""The input that holds each token's position."""


@dataclass(frozen=True)
class FoldRotaryTables(Pass):
    """`%c = cos(mul(reshape(%positions), @freq)) : f32[T, 64]` => `embedding(@cos, %positions)`.

    Requires: unit-batch-squeezed. Ensures: positions-folded.
    Keeps: every bit: the table holds what the program computes, for each position below the
    context limit; halves or neighbours that are equal are stored once and joined again.
    Why: no sines at run time; a table of 4096 positions is 1 MB.
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
        found = _PositionNodes(program, positions)
        tables = [value for value in found.tables() if self._worth(found, value)]
        if not tables:
            return finish(program, program, 0)
        total = sum(length * v.type.num_bytes({"T": 1}) for v in tables)
        if total > self.max_bytes:
            raise PassError(
                f"position tables for {length} tokens take {total >> 20} MiB",
                where=self.name,
                hint="lower runtime.max_context",
            )
        values = found.evaluate(length)
        misses = [v for v in tables if not _row_local(found, v, values[v.name])]
        for value in misses:
            raise PassError(
                f"{describe(found.producers[value.name])} mixes positions of different tokens",
                where=self.name,
            )
        builder = ProgramBuilder.from_program(program)
        table = ConstantTable(builder)
        wanted = {value.name for value in tables}
        for node in program.nodes:
            if node.outputs and node.outputs[0].name in wanted:
                _look_up(builder, table, node, positions, values[node.outputs[0].name])
            else:
                builder.copy(node)
        return finish(program, remove_dead_code(builder.build()), len(tables))

    def _worth(self, found: _PositionNodes, value: Value) -> bool:
        """A table that is looked up already, or a mere cast of positions, stays."""
        return any(
            get_op(node.op).kind is Kind.POINTWISE and node.op != "cast"
            for node in found.cone(value)
        )


class _PositionNodes:
    """The nodes that read nothing but positions and constants."""

    def __init__(self, program: Program, positions: Value) -> None:
        self.program = program
        self.positions = positions
        known = {positions.name}
        self.nodes: list[Node] = []
        for node in program.nodes:
            # Without operands: the ops that create values, which read no constant either.
            if reads_constants_only(program, node, lambda v: v.name in known):
                known.update(value.name for value in node.outputs)
                self.nodes.append(node)
        self.producers = {value.name: node for node in self.nodes for value in node.outputs}

    def tables(self) -> list[Value]:
        """The values to look up: read by other nodes, and not merely another view of a table."""
        inside = {id(node) for node in self.nodes}
        found: dict[str, Value] = {}
        for node in self.program.nodes:
            if id(node) in inside:
                continue
            for value in node.values():
                if value.name in self.producers:
                    base = self._behind_views(value)
                    if base is not None:
                        found[base.name] = base
        return list(found.values())

    def _behind_views(self, value: Value) -> Value | None:
        """Where the value's views and casts begin: the last float `[T, n]`; None for none."""
        while True:
            node = self.producers.get(value.name)
            if node is None:
                return None
            if not _is_rows(value):
                operands = node.values()
                if get_op(node.op).kind is not Kind.VIEW or len(operands) != 1:
                    return None
                value = operands[0]
                continue
            deeper = node.values()
            if node.op in ("reshape", "transpose", "expand", "cast") and _is_rows(deeper[0]):
                # A cast stays behind the table: a table holds what was computed, unrounded.
                value = deeper[0]
                continue
            return value

    def cone(self, value: Value) -> list[Node]:
        """The nodes that `value` is made by, in program order."""
        needed: set[int] = set()
        stack = [value]
        while stack:
            node = self.producers.get(stack.pop().name)
            if node is not None and id(node) not in needed:
                needed.add(id(node))
                stack.extend(node.values())
        return [node for node in self.nodes if id(node) in needed]

    def evaluate(self, length: int) -> dict[str, torch.Tensor]:
        """All values for the positions 0 .. length - 1."""
        import torch

        return self.at(torch.arange(length))

    def at(self, positions: torch.Tensor) -> dict[str, torch.Tensor]:
        """All values for these positions."""
        given = {self.positions.name: positions}
        return evaluate_nodes(self.program, self.nodes, given, len(positions))


def _is_rows(value: Value) -> bool:
    shape = value.type.shape
    return (
        len(shape) == 2
        and value.type.dtype.is_float
        and shape[0] == Sym("T")
        and not is_token_dim(shape[1], "T")
    )


def _row_local(found: _PositionNodes, value: Value, table: torch.Tensor) -> bool:
    """Whether a few positions in another order and company give the same rows."""
    import torch

    length = len(table)
    some = torch.tensor([length - 1, 0, length // 2, length // 3, min(17, length - 1)])
    return torch.equal(found.at(some)[value.name], table[some])


def _look_up(
    builder: ProgramBuilder, table: ConstantTable, node: Node, positions: Value, rows: Any
) -> None:
    """Emit the look-up of one table under the name of the value it replaces."""
    import torch

    mark = len(builder.nodes)
    value = node.output
    width = rows.shape[1]
    half = width // 2

    def emit(op: str, *inputs: Any, **attrs: Any) -> Value:
        hint = f"{value.name}.{op}"
        made = builder.add(op, inputs, attrs, names=(hint,), layer=node.layer, source=node.source)
        return made.output

    if width % 2 == 0 and torch.equal(rows[:, :half], rows[:, half:]):
        part = emit("embedding", table.add(f"table.{node.op}", rows[:, :half]), positions)
        result = emit("concat", part, part, dim=1)
    elif width % 2 == 0 and torch.equal(rows[:, 0::2], rows[:, 1::2]):
        part = emit("embedding", table.add(f"table.{node.op}", rows[:, 0::2]), positions)
        column = emit("reshape", part, shape=("T", half, 1))
        pairs = emit("concat", column, column, dim=2)
        result = emit("reshape", pairs, shape=("T", width))
    else:
        result = emit("embedding", table.add(f"table.{node.op}", rows), positions)
    adopt_name(builder, mark, value, result)
