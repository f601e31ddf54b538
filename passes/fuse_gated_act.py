"""Recognises the gated activation of a feed-forward layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.program import Attr, Operand, Program
from .base import Pass, PassContext, PassResult, finish
from .match import Match, NodeEmitter, OpPattern, Rule, Var, rewrite_all


@dataclass(frozen=True)
class FuseGatedAct(Pass):
    """`mul(silu(slice(%x) {stop = 8}), slice(%x) {start = 8})` => `gated_act(%x) {act = "silu"}`.

    Requires: unit-batch-squeezed. Ensures: nothing more.
    Keeps: reassociates (in 16-bit types one rounding instead of two).
    Why: the two halves are read once, without intermediate results.
    """

    name: ClassVar[str] = "fuse-gated-act"
    phase: ClassVar[str] = "fuse"
    contract: ClassVar[str] = "reassociates"
    requires: ClassVar[frozenset[str]] = frozenset({"unit-batch-squeezed"})

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Fuse wherever gate and up are the two halves of one value."""
        swept = rewrite_all(program, _RULES)
        return finish(program, swept.program, swept.matches, swept.near_misses)


_NAMES = {
    ("silu", None): "silu",
    ("relu", None): "relu",
    ("gelu", "none"): "gelu",
    ("gelu", "tanh"): "gelu_tanh",
}


def _half(prefix: str) -> OpPattern:
    start, stop = Var(f"{prefix}0"), Var(f"{prefix}1")
    attrs: dict[str, Attr | Var] = {"dim": Var("dim"), "start": start, "stop": stop, "step": 1}
    return OpPattern("slice", (Var("x", "value"),), attrs)


def _rule(op: str, approximate: str | None) -> Rule:
    attrs = {} if approximate is None else {"approximate": approximate}
    pattern = OpPattern("mul", (OpPattern(op, (_half("gate"),), attrs), _half("up")))

    def fuse(emit: NodeEmitter, match: Match) -> Operand:
        return emit("gated_act", match.value("x"), act=_NAMES[op, approximate])

    return Rule(pattern, fuse, _allowed)


def _allowed(program: Program, match: Match) -> str | None:
    captures, x = match.captures, match.value("x")
    if captures["dim"] != x.type.rank - 1:
        return "the halves are not of the last dimension"
    edges = [captures[name] for name in ("gate0", "gate1", "up0", "up1")]
    width = x.type.shape[-1]
    assert isinstance(width, int)
    half = width // 2
    if edges == [half, width, 0, half]:
        return "the gate is the second half"
    if width % 2 or edges != [0, half, half, width]:
        return f"gate and up are not the two halves: {edges}"
    return None


_RULES = tuple(_rule(op, approximate) for op, approximate in _NAMES)
