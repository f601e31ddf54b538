"""Recognises rotary position embedding: halves or neighbours paired, all of a head or a part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from ..ir.program import Attr, Node, Operand, Program, Value
from ..ir.shapes import spell_dim
from ..ir.types import Sym
from .base import Pass, PassContext, PassResult, finish
from .match import AnyOf, Match, NodeEmitter, OpPattern, Pattern, Rule, Var, rewrite_all


@dataclass(frozen=True)
class FuseRope(Pass):
    """`add(mul(%q, %cos), mul(concat(neg(%q2), %q1), %sin)) : f32[H, T, D]` =>
    `rope(%q', %cos', %sin') {style = "half"}` between transposes to tokens first.

    Requires: positions-folded. Ensures: rope-fused.
    Keeps: reassociates (in 16-bit types one rounding instead of three).
    Why: one read and one write instead of six; it can be fused into the write to the cache.
    """

    name: ClassVar[str] = "fuse-rope"
    phase: ClassVar[str] = "fuse"
    contract: ClassVar[str] = "reassociates"
    requires: ClassVar[frozenset[str]] = frozenset({"positions-folded"})
    ensures: ClassVar[frozenset[str]] = frozenset({"rope-fused"})

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Fuse the rotations, then those of a part of each head with the rest of it."""
        rules = [rule for last in (_HEADS, _ONE_HEAD) for rule in _rules(last)]
        swept = rewrite_all(program, rules)
        return finish(program, swept.program, swept.matches, swept.near_misses)


_X = Var("x", "value")
_HEADS, _ONE_HEAD = 2, 1
"""The dimension of a head's elements: of [H, T, D] and [T, H, D], and where the only head has lost
its own, [T, D], as squeezing and removed views leave it."""


def _rules(last: int) -> list[Rule]:
    """The rewrites of rotations whose heads lie along dimension `last`."""
    half, neighbours, first = _half(last), _neighbours(last), _first(last)
    return [
        Rule(_rotation(half, _X), _fuse_half, _half_allowed),
        Rule(_rotation(half, first), _fuse_half, _half_allowed),
        Rule(_rotation(_cast(half), _cast(_X)), _fuse_half, _half_allowed),
        Rule(_rotation(neighbours, _X), _fuse_neighbours, _neighbours_allowed),
        Rule(_rotation(neighbours, first), _fuse_neighbours, _neighbours_allowed),
        Rule(_apart(last), _fuse_apart, _apart_allowed),
        Rule(_partial(last), _fuse_partial, _partial_allowed),
        Rule(_cast(_wide(last)), _fuse_wide, _wide_allowed),
    ]


def _slice(last: int, start: str, stop: str, step: int = 1) -> OpPattern:
    edges: dict[str, Attr | Var] = {"start": Var(start), "stop": Var(stop), "step": step}
    return OpPattern("slice", (_X,), {"dim": last, **edges})


def _half(last: int) -> OpPattern:
    second, first = _slice(last, "half", "end"), _slice(last, "begin", "half")
    return OpPattern("concat", (OpPattern("neg", (second,)), first), {"dim": last})


def _apart(last: int) -> OpPattern:
    """Both halves turned by angles as many as one: no concat before, one behind."""
    cos, sin = Var("cos", "value"), Var("sin", "value")
    first, second = _slice(last, "begin", "half"), _slice(last, "half", "end")
    left = OpPattern("sub", (OpPattern("mul", (first, cos)), OpPattern("mul", (second, sin))))
    right = OpPattern("add", (OpPattern("mul", (second, cos)), OpPattern("mul", (first, sin))))
    return OpPattern("concat", (left, right), {"dim": last})


def _neighbours(last: int) -> OpPattern:
    odd = OpPattern("reshape", (OpPattern("neg", (_slice(last, "one", "end", 2),)),))
    even = OpPattern("reshape", (_slice(last, "begin", "end2", 2),))
    return OpPattern("reshape", (OpPattern("concat", (odd, even), {"dim": last + 1}),))


def _first(last: int) -> OpPattern:
    """The part of a head that is turned; what is cut from it is cut from the head itself."""
    return OpPattern("slice", (_X,), {"dim": last, "start": 0, "stop": Var("cut"), "step": 1})


def _cast(inner: Pattern) -> OpPattern:
    return OpPattern("cast", (inner,), any_attrs=True)


def _rotation(turned: OpPattern, whole: Pattern) -> OpPattern:
    """x * cos + turned(x) * sin, with x whole or a first part of it."""
    cos, sin = Var("cos", "value"), Var("sin", "value")
    return OpPattern("add", (OpPattern("mul", (whole, cos)), OpPattern("mul", (turned, sin))))


@dataclass(frozen=True, slots=True)
class _Angles:
    """The cosines or sines of each token, [T, width / 2], and how a rotation uses them."""

    rows: Value
    style: str
    width: int


def _angles(program: Program, value: Value, form: _Form, apart: bool) -> _Angles | None:
    """The angles behind a value that fold-rotary-tables made; None where it is something else.

    Such a value holds each angle twice, or once where halves are turned `apart`.
    """
    producers = program.producers()
    node = _behind_cast(producers, value)
    if form == "tokens first":
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
    """What makes a value, but for casts: rope takes angles in a wider type than its own."""
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
    if node.op not in ("rotary", "embedding"):
        return None
    width = node.output.type.shape[-1]
    return _Angles(node.output, style, 2 * width) if isinstance(width, int) else None


_Form = Literal["heads first", "tokens first", "one head"]


def _form(x: Value) -> _Form | None:
    """How x holds its heads: [H, T, D], [T, H, D] or [T, D]; None for something else."""
    tokens = [at for at, dim in enumerate(x.type.shape[:-1]) if dim == Sym("T")]
    if x.type.rank == 2:
        return "one head" if tokens == [0] else None
    if x.type.rank != 3 or not tokens:
        return None
    return "tokens first" if tokens[0] == 0 else "heads first"


def _both_angles(
    program: Program, match: Match, *, apart: bool = False
) -> tuple[_Angles, _Angles] | str:
    x = match.value("x")
    form = _form(x)
    if form is None:
        return f"{x} is {x.type}, none of [H, T, D], [T, H, D] and [T, D]"
    cos, sin = (_angles(program, match.value(name), form, apart) for name in ("cos", "sin"))
    if cos is None or sin is None:
        return "the angles are not of equal halves by position"
    if cos.width != sin.width or cos.style != sin.style:
        return "cosines and sines are paired in different ways"
    width = match.captures.get("cut", x.type.shape[-1])
    if cos.width != width:
        return f"angles for {cos.width} elements turn heads of {width}"
    return cos, sin


def _half_allowed(program: Program, match: Match) -> str | None:
    return _halves_allowed(match, _both_angles(program, match))


def _apart_allowed(program: Program, match: Match) -> str | None:
    return _halves_allowed(match, _both_angles(program, match, apart=True))


def _halves_allowed(match: Match, angles: tuple[_Angles, _Angles] | str) -> str | None:
    if isinstance(angles, str):
        return angles
    width = angles[0].width
    edges = [match.captures[name] for name in ("begin", "half", "end")]
    if edges != [0, width // 2, width]:
        return f"the halves are cut at {edges}"
    return None if angles[0].style == "half" else "halves are turned by angles of neighbours"


def _neighbours_allowed(program: Program, match: Match) -> str | None:
    angles = _both_angles(program, match)
    if isinstance(angles, str):
        return angles
    width = angles[0].width
    edges = [match.captures[name] for name in ("begin", "one", "end", "end2")]
    if edges[:2] != [0, 1] or not all(edge in (width, width - 1) for edge in edges[2:]):
        return f"neighbours are cut at {edges}"
    return None if angles[0].style == "interleaved" else "neighbours are turned by angles of halves"


def _fuse(emit: NodeEmitter, match: Match, style: str, *, apart: bool = False) -> Operand | None:
    program = emit.program
    angles = _both_angles(program, match, apart=apart)
    assert not isinstance(angles, str)
    cos, sin = angles
    x = match.value("x")
    if "cut" in match.captures:
        x = emit("slice", x, dim=x.type.rank - 1, start=0, stop=cos.width)
    if x.type.dtype is not match.root.output.type.dtype:
        x = emit("cast", x, dtype=match.root.output.type.dtype.value)
    attrs: dict[str, Attr] = {"style": style, "rotary_dim": cos.width}
    return _turned(emit, x, (cos.rows, sin.rows), attrs)


def _turned(
    emit: NodeEmitter, x: Value, angles: Sequence[Operand], attrs: Mapping[str, Attr]
) -> Operand:
    """The op on x brought to [T, H, D], its result brought back."""
    form = _form(x)
    if form == "heads first":
        tokens_first = emit("transpose", x, perm=(1, 0, 2))
        return emit("transpose", emit("rope", tokens_first, *angles, **attrs), perm=(1, 0, 2))
    if form == "tokens first":
        return emit("rope", x, *angles, **attrs)
    tokens, width = (spell_dim(dim) for dim in x.type.shape)
    headed = emit("reshape", x, shape=(tokens, 1, width))
    return emit("reshape", emit("rope", headed, *angles, **attrs), shape=(tokens, width))


def _fuse_half(emit: NodeEmitter, match: Match) -> Operand | None:
    return _fuse(emit, match, "half")


def _fuse_apart(emit: NodeEmitter, match: Match) -> Operand | None:
    return _fuse(emit, match, "half", apart=True)


def _fuse_neighbours(emit: NodeEmitter, match: Match) -> Operand | None:
    return _fuse(emit, match, "interleaved")


_ANGLES = (Var("cos", "value"), Var("sin", "value"))


def _rope(last: int, x: Pattern, width: str) -> Pattern:
    """What `_turned` makes of x: the op, and what brings its operand and result into shape."""
    attrs = {"style": Var("style"), "rotary_dim": Var(width)}
    around, how = ("reshape", {}) if last == _ONE_HEAD else ("transpose", {"perm": (1, 0, 2)})
    inner = OpPattern("rope", (OpPattern(around, (x,), how), *_ANGLES), attrs)
    return AnyOf((OpPattern(around, (inner,), how), OpPattern("rope", (x, *_ANGLES), attrs)))


def _partial(last: int) -> OpPattern:
    edges: dict[str, Attr | Var] = {"start": Var("cut"), "stop": Var("end"), "step": 1}
    rest = OpPattern("slice", (_X,), {"dim": last, **edges})
    return OpPattern("concat", (_rope(last, _first(last), "cut"), rest), {"dim": last})


def _partial_allowed(program: Program, match: Match) -> str | None:
    x = match.value("x")
    if match.captures["end"] != x.type.shape[-1]:
        return "a part of the head is dropped"
    return _not_one_head(match)


def _fuse_partial(emit: NodeEmitter, match: Match) -> Operand | None:
    return _turn_again(emit, match, match.captures["cut"])


def _turn_again(emit: NodeEmitter, match: Match, width: Attr) -> Operand:
    """The rotation that was matched, of x."""
    angles = [match.operand(name) for name in ("cos", "sin")]
    attrs = {"style": match.captures["style"], "rotary_dim": width}
    return _turned(emit, match.value("x"), angles, attrs)


def _wide(last: int) -> Pattern:
    """A rotation of widened heads: the op itself computes in float32 and rounds once."""
    return _rope(last, _cast(_X), "width")


def _wide_allowed(program: Program, match: Match) -> str | None:
    if match.root.output.type != match.value("x").type:
        return ""
    return _not_one_head(match)


def _not_one_head(match: Match) -> str | None:
    """Why a view that looks like one head, [T, D], is several side by side."""
    heads = {node.output.type.shape[1] for node in match.nodes if node.op == "rope"}
    several = match.value("x").type.rank == 2 and heads != {1}
    return f"{match.value('x')} holds several heads side by side" if several else None


def _fuse_wide(emit: NodeEmitter, match: Match) -> Operand | None:
    return _turn_again(emit, match, match.captures["width"])
