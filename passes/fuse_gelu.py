"""Recognises the tanh form of GELU that a model spells out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from ..ir.program import Operand, Program
from .base import Pass, PassContext, PassResult, finish
from .match import AnyOf, Match, NodeEmitter, OpPattern, Rule, Var, rewrite_all


@dataclass(frozen=True)
class FuseGelu(Pass):
    """`mul(mul(%x, 0.5), add(tanh(mul(add(%x, mul(pow(%x, 3), 0.0447)), 0.798)), 1))` =>
    `gelu(%x) {approximate = "tanh"}`.

    Requires: nothing. Ensures: nothing that a pass relies on.
    Keeps: reassociates (in 16-bit types one rounding instead of seven).
    Why: a single op with a kernel, which the pattern of gated activations matches.
    """

    name: ClassVar[str] = "fuse-gelu"
    phase: ClassVar[str] = "fuse"
    contract: ClassVar[str] = "reassociates"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Fuse wherever the constants are those of the tanh form."""
        swept = rewrite_all(program, _RULES)
        return finish(program, swept.program, swept.matches, swept.near_misses)


def _times(value: Var | OpPattern, name: str) -> OpPattern:
    return OpPattern("mul", (value, Var(name, "literal")))


_X = Var("x", "value")
_CUBE = AnyOf((OpPattern("pow", (_X, 3)), OpPattern("mul", (OpPattern("mul", (_X, _X)), _X))))
_INNER = OpPattern("add", (_X, OpPattern("mul", (_CUBE, Var("cubic", "literal")))))
_CURVE = OpPattern("add", (OpPattern("tanh", (_times(_INNER, "slope"),)), 1))
_CONSTANTS = {"half": 0.5, "cubic": 0.044715, "slope": math.sqrt(2 / math.pi)}


def _allowed(program: Program, match: Match) -> str | None:
    for name, wanted in _CONSTANTS.items():
        if not math.isclose(match.captures[name], wanted, rel_tol=1e-5):
            return f"the constant {match.captures[name]} should be {wanted:.6g}"
    return None


def _fuse(emit: NodeEmitter, match: Match) -> Operand:
    return emit("gelu", match.value("x"), approximate="tanh")


_RULES = (
    Rule(OpPattern("mul", (_times(_X, "half"), _CURVE)), _fuse, _allowed),
    Rule(_times(OpPattern("mul", (_X, _CURVE)), "half"), _fuse, _allowed),
)
"""The half may stand before the product or behind it."""
