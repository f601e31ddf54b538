"""Removes casts, views and arithmetic that change nothing, and merges those that follow another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..ir.program import Operand, Program, Value
from ..ir.shapes import add_dims, parse_dim, spell_dim
from ..ir.types import Dim, DType, TensorType
from .base import Pass, PassContext, PassResult, finish
from .match import Match, NodeEmitter, OpPattern, Rule, Var, rewrite_all

_WIDENS = {
    DType.BF16: {DType.F32, DType.F64},
    DType.F16: {DType.F32, DType.F64},
    DType.F32: {DType.F64},
    DType.I8: {DType.I32, DType.I64},
    DType.U8: {DType.I32, DType.I64},
    DType.I32: {DType.I64},
    DType.BOOL: {DType.I8, DType.U8, DType.I32, DType.I64, DType.F32, DType.F64},
}
"""Element types that hold every value of another."""


@dataclass(frozen=True)
class RemoveNoOp(Pass):
    """`%1 = reshape(%0) : f32[T, 2, 4]; %2 = reshape(%1) : f32[T, 8]` => `reshape(%0) : f32[T, 8]`.

    Requires: nothing. Ensures: no-no-op (no cast, view or arithmetic that changes nothing).
    Keeps: every bit, but the sign of zero in `x + 0`.
    Why: patterns need to match only one form; transposes left by fusions cancel.
    """

    name: ClassVar[str] = "remove-no-op"
    phase: ClassVar[str] = "canonicalize"
    ensures: ClassVar[frozenset[str]] = frozenset({"no-no-op"})

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Apply every rule until none finds anything."""
        swept = rewrite_all(program, RULES)
        return finish(program, swept.program, swept.matches)


def _type(value: Operand) -> TensorType:
    assert isinstance(value, Value)
    return value.type


def _one(op: str) -> OpPattern:
    return OpPattern(op, (Var("x", "value"),), any_attrs=True)


def _two(op: str, inner: str) -> OpPattern:
    """`op` of `inner` of x; the inner node stays where others read it."""
    seen_through = OpPattern(inner, (Var("x", "value"),), shared=True, any_attrs=True)
    return OpPattern(op, (seen_through,), any_attrs=True)


def _same_type(emit: NodeEmitter, match: Match) -> Operand | None:
    x = match.value("x")
    return x if x.type == match.root.output.type else None


def _inner_attrs(emit: NodeEmitter, match: Match) -> Any:
    """The attributes of the inner node of a `_two` pattern."""
    inner = match.root.values()[0]
    for node in reversed(emit.builder.nodes):
        if inner in node.outputs:
            return node.attrs
    return None


def _cast_of_cast(emit: NodeEmitter, match: Match) -> Operand | None:
    source = match.value("x").type.dtype
    middle = match.root.values()[0].type.dtype
    if middle is not source and middle not in _WIDENS.get(source, set()):
        return None
    last = match.root.output.type.dtype
    x = match.value("x")
    return x if last is source else emit("cast", x, dtype=last.value)


def _reshape_of_reshape(emit: NodeEmitter, match: Match) -> Operand | None:
    return emit("reshape", match.value("x"), shape=match.root.attrs["shape"])


def _transpose(emit: NodeEmitter, match: Match) -> Operand | None:
    """A transpose that moves only dimensions of size 1 is a reshape, or nothing."""
    x, perm = match.value("x"), match.root.attrs["perm"]
    assert isinstance(perm, tuple)
    moved = [p for p in perm if isinstance(p, int) and x.type.shape[p] != 1]
    if moved != sorted(moved):
        return None
    shape = match.root.output.type.shape
    if shape == x.type.shape:
        return x
    return emit("reshape", x, shape=tuple(map(spell_dim, shape)))


def _transpose_of_transpose(emit: NodeEmitter, match: Match) -> Operand | None:
    attrs = _inner_attrs(emit, match)
    outer = match.root.attrs["perm"]
    if attrs is None or not isinstance(outer, tuple):
        return None
    inner = attrs["perm"]
    return emit("transpose", match.value("x"), perm=tuple(inner[i] for i in outer))


def _slice_of_slice(emit: NodeEmitter, match: Match) -> Operand | None:
    inner, outer = _inner_attrs(emit, match), match.root.attrs
    if inner is None or inner["dim"] != outer["dim"] or inner["step"] != 1:
        return None
    base = parse_dim(inner["start"])
    edges = [add_dims(base, parse_dim(outer[edge])) for edge in ("start", "stop")]  # type: ignore[arg-type]
    if None in edges:
        return None
    start, stop = (spell_dim(edge) for edge in edges if edge is not None)
    return emit(
        "slice", match.value("x"), dim=outer["dim"], start=start, stop=stop, step=outer["step"]
    )


def _slice_of_concat(emit: NodeEmitter, match: Match) -> Operand | None:
    """A slice that is exactly one part of a concat is that part."""
    joined = match.root.values()[0]
    node = next((n for n in reversed(emit.builder.nodes) if joined in n.outputs), None)
    outer = match.root.attrs
    if node is None or node.op != "concat" or node.attrs["dim"] != outer["dim"]:
        return None
    dim, start = outer["dim"], 0
    assert isinstance(dim, int)
    for part in node.inputs:
        kind = emit.type_of(part)
        size: Dim = kind.shape[dim]
        if not isinstance(size, int):
            return None
        if outer["start"] == start and outer["stop"] == start + size and outer["step"] == 1:
            return part if isinstance(part, Value) else None
        start += size
    return None


def _neutral(emit: NodeEmitter, match: Match) -> Operand | None:
    """x where the other operand is a literal that changes nothing."""
    a, b = match.root.inputs
    neutral = {"add": 0, "sub": 0, "mul": 1, "div": 1, "pow": 1}[match.root.op]
    for x, other in ((a, b), (b, a)):
        if not isinstance(x, Value) or isinstance(other, (Value, bool)):
            continue
        if isinstance(other, (int, float)) and math.isclose(other, neutral, rel_tol=0, abs_tol=0):
            commutes = match.root.op in ("add", "mul")
            return x if x is a or commutes else None
    return None


def _concat(emit: NodeEmitter, match: Match) -> Operand | None:
    """Empty parts go; what is left of a concat may be one value."""
    dim, parts = match.root.attrs["dim"], match.root.inputs
    assert isinstance(dim, int)
    kept = [part for part in parts if emit.type_of(part).shape[dim] != 0]
    if len(kept) == 1:
        return kept[0] if isinstance(kept[0], Value) else None
    if len(kept) == len(parts) or not kept:
        return None
    return emit("concat", *kept, dim=dim)


_Action = Callable[[NodeEmitter, Match], Operand | None]

_ONE: tuple[tuple[str, _Action], ...] = (
    ("cast", _same_type),
    ("reshape", _same_type),
    ("expand", _same_type),
    ("slice", _same_type),
    ("transpose", _transpose),
)

RULES = (
    *(Rule(_one(op), action) for op, action in _ONE),
    Rule(_two("cast", "cast"), _cast_of_cast),
    Rule(_two("reshape", "reshape"), _reshape_of_reshape),
    Rule(_two("transpose", "transpose"), _transpose_of_transpose),
    Rule(_two("slice", "slice"), _slice_of_slice),
    Rule(_one("slice"), _slice_of_concat),
    Rule(OpPattern("concat", None, any_attrs=True), _concat),
    Rule(_two("neg", "neg"), lambda emit, match: match.value("x")),
    *(
        Rule(OpPattern(op, (Var("a"), Var("b"))), _neutral)
        for op in ("add", "sub", "mul", "div", "pow")
    ),
)
"""Everything this pass removes; a replacement that declines leaves the node alone."""
