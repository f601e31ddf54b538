"""Recognises rotary position embedding: halves or neighbours paired, all of a head or a part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.program import Attr, Node, Operand, Program, Value, WeightRef
from ..ir.types import Sym
from .base import Pass, PassContext, PassResult, finish
from .match import AnyOf, Emitter, Match, OpPattern, Pattern, Rule, Var, rewrite_all


@dataclass(frozen=True)
class FuseRope(Pass):
    """`add(mul(%q, %cos), mul(concat(neg(%q2), %q1), %sin)) : f32[H, T, D]` =>
    `rope(%q', %positions, @cos, @sin) {style = "half"}` between transposes to tokens first.

    Requires: positions-folded. Ensures: rope-fused.
    Keeps: reassociates (in 16-bit types one rounding instead of three).
    Why: one read and one write instead of six; and the write to the cache can take it in.
    """

    name: ClassVar[str] = "fuse-rope"
    phase: ClassVar[str] = "fuse"
    contract: ClassVar[str] = "reassociates"
    requires: ClassVar[frozenset[str]] = frozenset({"positions-folded"})
    ensures: ClassVar[frozenset[str]] = frozenset({"rope-fused"})

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Fuse the rotations, then those of a part of each head with the rest of it."""
        rules = [
            Rule(_rotation(_HALF, _X), _fuse_half, _half_allowed),
            Rule(_rotation(_HALF, _FIRST), _fuse_half, _half_allowed),
            Rule(_rotation(_cast(_HALF), _cast(_X)), _fuse_half, _half_allowed),
            Rule(_rotation(_NEIGHBOURS, _X), _fuse_neighbours, _neighbours_allowed),
            Rule(_rotation(_NEIGHBOURS, _FIRST), _fuse_neighbours, _neighbours_allowed),
            Rule(_APART, _fuse_apart, _apart_allowed),
            Rule(_PARTIAL, _fuse_partial, _partial_allowed),
            Rule(_cast(_WIDE), _fuse_wide, _wide_allowed),
        ]
        swept = rewrite_all(program, rules)
        return finish(program, swept.program, swept.matches, swept.near_misses)


_X = Var("x", "value")


def _slice(start: str, stop: str, step: int = 1) -> OpPattern:
    attrs: dict[str, Attr | Var] = {"dim": 2, "start": Var(start), "stop": Var(stop), "step": step}
    return OpPattern("slice", (_X,), attrs)


_HALF = OpPattern(
    "concat", (OpPattern("neg", (_slice("half", "end"),)), _slice("begin", "half")), {"dim": 2}
)


def _turned_apart() -> OpPattern:
    """Both halves turned by tables as long as one: no concat before, one behind."""
    cos, sin = Var("cos", "value"), Var("sin", "value")
    first, second = _slice("begin", "half"), _slice("half", "end")
    left = OpPattern("sub", (OpPattern("mul", (first, cos)), OpPattern("mul", (second, sin))))
    right = OpPattern("add", (OpPattern("mul", (second, cos)), OpPattern("mul", (first, sin))))
    return OpPattern("concat", (left, right), {"dim": 2})


_APART = _turned_apart()


def _column(inner: Pattern) -> OpPattern:
    return OpPattern("reshape", (inner,))


_NEIGHBOURS = OpPattern(
    "reshape",
    (
        OpPattern(
            "concat",
            (
                _column(OpPattern("neg", (_slice("one", "end", 2),))),
                _column(_slice("begin", "end2", 2)),
            ),
            {"dim": 3},
        ),
    ),
)


_FIRST = OpPattern("slice", (_X,), {"dim": 2, "start": 0, "stop": Var("cut"), "step": 1})
"""The part of a head that is turned; what is cut from it is cut from the head itself."""


def _cast(inner: Pattern) -> OpPattern:
    return OpPattern("cast", (inner,), any_attrs=True)


def _rotation(turned: OpPattern, whole: Pattern) -> OpPattern:
    """x * cos + turned(x) * sin, with x whole or a first part of it."""
    cos, sin = Var("cos", "value"), Var("sin", "value")
    return OpPattern("add", (OpPattern("mul", (whole, cos)), OpPattern("mul", (turned, sin))))


@dataclass(frozen=True, slots=True)
class _Angles:
    """Where the cosines or sines of a rotation come from."""

    table: WeightRef
    positions: Value
    style: str
    width: int


def _angles(program: Program, value: Value, head_major: bool, apart: bool) -> _Angles | None:
    """The table behind a value that fold-rotary-tables made; None where it is something else.

    Such a value holds each angle twice, or once where halves are turned `apart`.
    """
    producers = program.producers()
    node = _behind_cast(producers, value)
    if not head_major:
        if node is None or node.op != "reshape" or node.output.type.shape[1:2] != (1,):
            return None
        node = _behind_cast(producers, node.values()[0])
    if node is None:
        return None
    if apart:
        return _looked_up(node, "half")
    style = "half"
    if node.op == "reshape":
        style = "interleaved"
        node = producers.get(node.values()[0].name)
    return None if node is None else _table_of(node, producers, style)


def _behind_cast(producers: dict[str, Node], value: Value) -> Node | None:
    """What makes a value, but for casts: rope takes tables in a wider type than its own."""
    node = producers.get(value.name)
    while node is not None and node.op == "cast":
        node = producers.get(node.values()[0].name)
    return node


def _table_of(joined: Node, producers: dict[str, Node], style: str) -> _Angles | None:
    if joined.op != "concat" or len(joined.inputs) != 2 or joined.inputs[0] != joined.inputs[1]:
        return None
    node = producers.get(joined.values()[0].name)
    if style == "interleaved" and node is not None and node.op == "reshape":
        node = producers.get(node.values()[0].name)
    return None if node is None else _looked_up(node, style)


def _looked_up(node: Node, style: str) -> _Angles | None:
    if node.op != "embedding":
        return None
    table, positions = node.inputs
    if not isinstance(table, WeightRef) or not isinstance(positions, Value):
        return None
    width = node.output.type.shape[1]
    return _Angles(table, positions, style, 2 * width) if isinstance(width, int) else None


def _head_major(x: Value) -> bool | None:
    """Whether x is [H, T, D] (True), [T, H, D] (False), or something else."""
    if x.type.rank != 3:
        return None
    if x.type.shape[0] == Sym("T"):
        return False
    return True if x.type.shape[1] == Sym("T") else None


def _tables(
    program: Program, match: Match, *, apart: bool = False
) -> tuple[_Angles, _Angles] | str:
    x = match.value("x")
    head_major = _head_major(x)
    if head_major is None:
        return f"{x} is {x.type}, neither [H, T, D] nor [T, H, D]"
    cos = _angles(program, match.value("cos"), head_major, apart)
    sin = _angles(program, match.value("sin"), head_major, apart)
    if cos is None or sin is None:
        return "the angles do not come from tables of equal halves by position"
    if cos.positions != sin.positions or cos.width != sin.width or cos.style != sin.style:
        return "cosines and sines are looked up in different ways"
    width = match.captures.get("cut", x.type.shape[2])
    if cos.width != width:
        return f"tables for {cos.width} elements turn heads of {width}"
    return cos, sin


def _half_allowed(program: Program, match: Match) -> str | None:
    return _halves_allowed(match, _tables(program, match))


def _apart_allowed(program: Program, match: Match) -> str | None:
    return _halves_allowed(match, _tables(program, match, apart=True))


def _halves_allowed(match: Match, tables: tuple[_Angles, _Angles] | str) -> str | None:
    if isinstance(tables, str):
        return tables
    width = tables[0].width
    edges = [match.captures[name] for name in ("begin", "half", "end")]
    if edges != [0, width // 2, width]:
        return f"the halves are cut at {edges}"
    return None if tables[0].style == "half" else "halves are turned by angles of neighbours"


def _neighbours_allowed(program: Program, match: Match) -> str | None:
    tables = _tables(program, match)
    if isinstance(tables, str):
        return tables
    width = tables[0].width
    edges = [match.captures[name] for name in ("begin", "one", "end", "end2")]
    if edges[:2] != [0, 1] or not all(edge in (width, width - 1) for edge in edges[2:]):
        return f"neighbours are cut at {edges}"
    return None if tables[0].style == "interleaved" else "neighbours are turned by angles of halves"


def _fuse(emit: Emitter, match: Match, style: str, *, apart: bool = False) -> Operand | None:
    program = emit.program
    tables = _tables(program, match, apart=apart)
    assert not isinstance(tables, str)
    cos, sin = tables
    x = match.value("x")
    if "cut" in match.captures:
        x = emit("slice", x, dim=2, start=0, stop=cos.width)
    if x.type.dtype is not match.root.output.type.dtype:
        x = emit("cast", x, dtype=match.root.output.type.dtype.value)
    attrs = {"style": style, "rotary_dim": cos.width}
    if not _head_major(x):
        return emit("rope", x, cos.positions, cos.table, sin.table, **attrs)
    tokens_first = emit("transpose", x, perm=(1, 0, 2))
    turned = emit("rope", tokens_first, cos.positions, cos.table, sin.table, **attrs)
    return emit("transpose", turned, perm=(1, 0, 2))


def _fuse_half(emit: Emitter, match: Match) -> Operand | None:
    return _fuse(emit, match, "half")


def _fuse_apart(emit: Emitter, match: Match) -> Operand | None:
    return _fuse(emit, match, "half", apart=True)


def _fuse_neighbours(emit: Emitter, match: Match) -> Operand | None:
    return _fuse(emit, match, "interleaved")


_REST = OpPattern("slice", (_X,), {"dim": 2, "start": Var("cut"), "stop": Var("end"), "step": 1})
_TABLES = (Var("positions"), Var("cos", "weight"), Var("sin", "weight"))
_TURN = {"style": Var("style"), "rotary_dim": Var("cut")}
_SWAP = {"perm": (1, 0, 2)}
_TURNED_FIRST = OpPattern(
    "transpose",
    (OpPattern("rope", (OpPattern("transpose", (_FIRST,), _SWAP), *_TABLES), _TURN),),
    _SWAP,
)
_TOKEN_MAJOR = OpPattern("rope", (_FIRST, *_TABLES), _TURN)
_PARTIAL = OpPattern("concat", (AnyOf((_TURNED_FIRST, _TOKEN_MAJOR)), _REST), {"dim": 2})


def _partial_allowed(program: Program, match: Match) -> str | None:
    x = match.value("x")
    if match.captures["end"] != x.type.shape[2]:
        return "a part of the head is dropped"
    return None


def _fuse_partial(emit: Emitter, match: Match) -> Operand | None:
    return _turn_again(emit, match, match.captures["cut"])


def _turn_again(emit: Emitter, match: Match, width: Attr) -> Operand:
    """The rotation that was matched, of x."""
    x = match.value("x")
    tables = [match.operand(name) for name in ("positions", "cos", "sin")]
    attrs = {"style": match.captures["style"], "rotary_dim": width}
    if not _head_major(x):
        return emit("rope", x, *tables, **attrs)
    tokens_first = emit("transpose", x, perm=(1, 0, 2))
    return emit("transpose", emit("rope", tokens_first, *tables, **attrs), perm=(1, 0, 2))


_ANY_TURN = {"style": Var("style"), "rotary_dim": Var("width")}
_WIDE_TOKEN_MAJOR = OpPattern("rope", (_cast(_X), *_TABLES), _ANY_TURN)
_WIDE_HEAD_MAJOR = OpPattern(
    "transpose",
    (OpPattern("rope", (OpPattern("transpose", (_cast(_X),), _SWAP), *_TABLES), _ANY_TURN),),
    _SWAP,
)
_WIDE = AnyOf((_WIDE_HEAD_MAJOR, _WIDE_TOKEN_MAJOR))
"""A rotation of widened heads: the op itself computes in float32 and rounds once."""


def _wide_allowed(program: Program, match: Match) -> str | None:
    return None if match.root.output.type == match.value("x").type else ""


def _fuse_wide(emit: Emitter, match: Match) -> Operand | None:
    return _turn_again(emit, match, match.captures["width"])
