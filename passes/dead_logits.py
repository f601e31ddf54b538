"""Computes only the rows whose logits are wanted, from the last attention on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ..ir.builder import ProgramBuilder, remove_dead_code
from ..ir.ops import Kind, get_op
from ..ir.program import Attr, Node, Operand, Program, Value
from ..ir.types import Sym
from .base import Pass, PassContext, PassResult, finish

TOKENS, ROWS = "T", "R"
LOGITS_INDEX = "logits_index"
"""The input that says which rows' logits are wanted."""


@dataclass(frozen=True)
class DeadLogits(Pass):
    """`take(rms_norm(%x, @w), %logits_index)` => `rms_norm(take(%x, %logits_index), @w)`.

    Requires: unit-batch-squeezed. Ensures: no row past the last attention that nobody asked for.
    Keeps: every bit: what moves treats each row by itself.
    Why: a prompt's last layer and final norm run for one row of a chunk instead of all.
    """

    name: ClassVar[str] = "dead-logits"
    phase: ClassVar[str] = "fuse"
    requires: ClassVar[frozenset[str]] = frozenset({"unit-batch-squeezed"})

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Move the take of logits rows up; a match is an op that runs on fewer rows."""
        takes = [node for node in program.nodes if _is_logits_take(node)]
        if len(takes) != 1 or ROWS not in program.symbols:
            return PassResult(program)
        cone = _cone(program, takes[0])
        if not cone:
            return PassResult(program)
        rebuilt = _Sinker(ProgramBuilder.from_program(program), takes[0], cone).run(program)
        return finish(program, remove_dead_code(rebuilt), len(cone))


def _is_logits_take(node: Node) -> bool:
    index = node.inputs[1] if node.op == "take" else None
    return isinstance(index, Value) and index.name == LOGITS_INDEX and node.attrs["dim"] == 0


def _cone(program: Program, take: Node) -> set[int]:
    """The nodes (by id) that only the take reads, and that treat each row by itself."""
    outputs = {value.name for value in program.outputs}
    consumers = program.consumers()
    cone: set[int] = set()
    for node in reversed(program.nodes):
        users = [user for value in node.outputs for user in consumers.get(value.name, [])]
        if not users or any(value.name in outputs for value in node.outputs):
            continue
        if all(id(user) in cone or user is take for user in users) and _row_local(program, node):
            cone.add(id(node))
    return cone


def _row_local(program: Program, node: Node) -> bool:
    """Whether row i of the results depends on row i of the operands alone."""
    op = get_op(node.op)
    if op.effects or op.kind in (Kind.ATTENTION, Kind.CREATION, Kind.GATHER):
        return False
    values = [*node.values(), *node.outputs]
    if not all(_rows_lead(value) or not _has_tokens(value) for value in values):
        return False
    if not all(_rows_lead(value) for value in node.outputs):
        return False
    types = [program.operand_type(operand) for operand in node.inputs]
    outs = tuple(value.type for value in node.outputs)
    return op.mixes(types, outs, node.attrs, TOKENS) is None


def _has_tokens(value: Value) -> bool:
    return any(isinstance(dim, Sym) and dim.name == TOKENS for dim in value.type.shape)


def _rows_lead(value: Value) -> bool:
    """The tokens are the first dimension, and no other."""
    shape = value.type.shape
    return (
        bool(shape)
        and shape[0] == Sym(TOKENS)
        and not any(isinstance(dim, Sym) for dim in shape[1:])
    )


@dataclass(slots=True)
class _Sinker:
    """Rebuilds a program with the cone on `R` rows instead of `T`."""

    builder: ProgramBuilder
    take: Node
    cone: set[int]
    rows: dict[str, Operand] = field(default_factory=dict)

    def run(self, program: Program) -> Program:
        for node in program.nodes:
            if node is self.take:
                source = node.inputs[0]
                assert isinstance(source, Value), "rows are taken of a value"
                self.builder.replace(node.output, self._on_rows(source))
            elif id(node) in self.cone:
                self._shrink(node)
            else:
                self.builder.copy(node)
        return self.builder.build()

    def _shrink(self, node: Node) -> None:
        inputs = [self._on_rows(v) if isinstance(v, Value) else v for v in node.inputs]
        attrs = {name: _renamed(value) for name, value in node.attrs.items()}
        names = [f"{value.name}.rows" for value in node.outputs]
        made = self.builder.add(
            node.op, inputs, attrs, names=names, layer=node.layer, source=node.source
        )
        for old, new in zip(node.outputs, made.outputs, strict=True):
            self.rows[old.name] = new

    def _on_rows(self, value: Value) -> Operand:
        """The wanted rows of a value; the value itself where it has no tokens."""
        if value.name not in self.rows:
            if not _has_tokens(value):
                return value
            index = self.take.inputs[1]
            made = self.builder.add(
                "take", [value, index], {"dim": 0}, names=[f"{value.name}.rows"]
            )
            self.rows[value.name] = made.output
        return self.rows[value.name]


def _renamed(value: Attr) -> Attr:
    """A shape in an attribute, on rows instead of tokens."""
    if isinstance(value, tuple):
        return tuple(_renamed(item) for item in value)
    return ROWS if value == TOKENS else value
