"""Computes only the rows whose logits are wanted, from right behind the last attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.analyses import LOGITS_INDEX
from ..ir.builder import ProgramBuilder, remove_dead_code
from ..ir.ops import Kind, get_op
from ..ir.program import Node, Program, Value
from ..ir.shapes import parse_dim, product, spell_dim
from ..ir.types import Sym
from .base import Pass, PassContext, PassResult, finish

_TOKENS = Sym("T")


@dataclass(frozen=True)
class SinkLogitsRows(Pass):
    """`%n = rms_norm(%h, @w); %r = take(%n, %logits_index)` =>
    `%t = take(%h, %logits_index); %r = rms_norm(%t, @w) : f32[R, 64]`.

    Requires: unit-batch-squeezed. Ensures: logits-rows-sunk.
    Keeps: every bit: each row is computed from its own row, as before.
    Why: a prompt of 4096 tokens computes one row of the last feed-forward layer instead of 4096.
    """

    name: ClassVar[str] = "sink-logits-rows"
    phase: ClassVar[str] = "fuse"
    requires: ClassVar[frozenset[str]] = frozenset({"unit-batch-squeezed"})
    ensures: ClassVar[frozenset[str]] = frozenset({"logits-rows-sunk"})

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Move the choice of rows up to where other rows are still needed."""
        takes = [node for node in program.nodes if _is_take(node)]
        moved = _movable(program, takes)
        if not moved:
            return finish(program, program, 0)
        builder = ProgramBuilder.from_program(program)
        rows: dict[str, Value] = {}
        for node in program.nodes:
            if id(node) in moved:
                _emit_rows(builder, node, rows, takes[0])
            elif _is_take(node) and node.values()[0].name in rows:
                builder.replace(node.output, rows[node.values()[0].name])
            else:
                builder.copy(node)
        return finish(program, remove_dead_code(builder.build()), len(moved))


def _is_take(node: Node) -> bool:
    """Whether a node takes the logits' rows of a token-major value."""
    if node.op != "take" or node.attrs["dim"] != 0 or len(node.values()) != 2:
        return False
    x, index = node.values()
    return index.name == LOGITS_INDEX and x.type.shape[0] == _TOKENS


def _movable(program: Program, takes: list[Node]) -> set[int]:
    """The nodes all of whose results are read by the takes alone, or by one another."""
    consumers = program.consumers()
    outputs = {value.name for value in program.outputs}
    inside = {id(node) for node in takes}
    moved: set[int] = set()
    for node in reversed(program.nodes):
        if id(node) in inside or not node.outputs or not _row_local(node):
            continue
        users = [user for value in node.outputs for user in consumers.get(value.name, [])]
        unseen = not any(value.name in outputs for value in node.outputs)
        if users and unseen and all(id(user) in inside for user in users):
            inside.add(id(node))
            moved.add(id(node))
    return moved


def _row_local(node: Node) -> bool:
    """Whether row t of every result comes from row t of the operands alone, tokens first."""
    op = get_op(node.op)
    if op.effects or op.kind in (Kind.ATTENTION, Kind.STATE, Kind.CREATION):
        return False
    if any(not v.type.shape or v.type.shape[0] != _TOKENS for v in node.outputs):
        return False
    for value in node.values():
        if not value.type.shape or value.type.shape[0] != _TOKENS:
            return False
        if op.kind is Kind.POINTWISE and value.type.rank != node.output.type.rank:
            return False
    types = [v.type for v in node.values()]
    if op.kind is Kind.MATRIX and node.op == "matmul":
        return False
    if node.op == "reshape":
        source, out = types[0].shape, node.output.type.shape
        return product(source[1:]) == product(out[1:])
    if node.op == "transpose":
        perm = node.attrs["perm"]
        return isinstance(perm, tuple) and perm[0] == 0
    if node.op in ("slice", "concat", "softmax", "cumsum", "gather", "scatter"):
        return node.attrs["dim"] != 0
    if "dims" in node.attrs:
        dims = node.attrs["dims"]
        return isinstance(dims, tuple) and 0 not in dims
    # A table that is looked up by token is fine; a value that is indexed by others is not.
    return node.op != "take"


def _emit_rows(builder: ProgramBuilder, node: Node, rows: dict[str, Value], take: Node) -> None:
    """The node on the wanted rows alone."""
    index = take.values()[1]
    count = spell_dim(index.type.shape[0])
    for value in node.values():
        if value.name not in rows:
            taken = builder.add(
                "take",
                (value, index),
                {"dim": 0},
                names=(f"{value.name}.rows",),
                layer=node.layer,
                source=node.source,
            )
            rows[value.name] = taken.output
    inputs = [rows[v.name] if isinstance(v, Value) else v for v in node.inputs]
    attrs = dict(node.attrs)
    if isinstance(attrs.get("shape"), tuple):
        attrs["shape"] = tuple(
            count if parse_dim(dim) == _TOKENS else dim  # type: ignore[arg-type]
            for dim in attrs["shape"]  # type: ignore[union-attr]
        )
    made = builder.add(
        node.op,
        inputs,
        attrs,
        names=tuple(f"{value.name}.rows" for value in node.outputs),
        layer=node.layer,
        source=node.source,
    )
    for old, new in zip(node.outputs, made.outputs, strict=True):
        rows[old.name] = new
