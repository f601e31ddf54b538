"""Recognises layer normalisation that a model spells out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.program import Operand, Program, WeightRef
from .base import Pass, PassContext, PassResult, finish
from .fuse_rms_norm import is_rounded_next, shifted_weight
from .match import (
    AnyOf,
    Match,
    Maybe,
    NodeEmitter,
    OpPattern,
    Rule,
    Var,
    optional_cast,
    rewrite_all,
)


@dataclass(frozen=True)
class FuseLayerNorm(Pass):
    """`%d = sub(%x, mean(%x)); mul(@w, mul(%d, rsqrt(add(mean(pow(%d, 2)), 1e-5))))` =>
    `layer_norm(%x, @w) {eps = 1e-5}`.

    Requires: unit-batch-squeezed. Ensures: nothing more (the op itself is captured as such).
    Keeps: reassociates; the bias that may follow is fused with it.
    Why: one read and one write of the row instead of seven of each.
    """

    name: ClassVar[str] = "fuse-layer-norm"
    phase: ClassVar[str] = "fuse"
    contract: ClassVar[str] = "reassociates"
    requires: ClassVar[frozenset[str]] = frozenset({"unit-batch-squeezed"})

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Fuse every spelt-out norm over the last dimension, with its bias first; and what stands
        around norms that are ops already."""
        swept = rewrite_all(
            program,
            [Rule(_BIASED, _fuse, _allowed), Rule(_PLAIN, _fuse, _allowed), _AROUND_ONE, _WIDENED],
        )
        return finish(program, swept.program, swept.matches, swept.near_misses)


_WIDE = Maybe("cast", Var("x", "value"))
_CENTRED = OpPattern(
    "sub", (_WIDE, OpPattern("mean", (_WIDE,), {"dims": Var("dims"), "keepdim": True}))
)
_SQUARES = AnyOf((OpPattern("pow", (_CENTRED, 2)), OpPattern("mul", (_CENTRED, _CENTRED))))
_VARIANCE = OpPattern("mean", (_SQUARES,), {"dims": Var("dims"), "keepdim": True})
_SHIFTED = OpPattern("add", (_VARIANCE, Var("eps", "literal")))
_NORMED = AnyOf(
    (
        OpPattern("mul", (_CENTRED, OpPattern("rsqrt", (_SHIFTED,)))),
        OpPattern("div", (_CENTRED, OpPattern("sqrt", (_SHIFTED,)))),
    )
)
_SCALED = OpPattern("mul", (optional_cast(Var("w", "weight")), _NORMED))
_WITH_BIAS = OpPattern("add", (_SCALED, optional_cast(Var("b", "weight"))))
_PLAIN = AnyOf((OpPattern("cast", (_SCALED,)), _SCALED))
_BIASED = AnyOf((OpPattern("cast", (_WITH_BIAS,)), _WITH_BIAS))


def _fuse(emit: NodeEmitter, match: Match) -> Operand:
    weights = [match.operand(name) for name in ("w", "b") if name in match.captures]
    return emit("layer_norm", match.value("x"), *weights, eps=float(match.captures["eps"]))


def _shift(emit: NodeEmitter, match: Match) -> Operand:
    weight = match.operand("w")
    assert isinstance(weight, WeightRef)
    weight = shifted_weight(emit, weight, float(match.captures["one"]))
    bias = [match.operand("b")] if "b" in match.captures else []
    return emit("layer_norm", match.value("x"), weight, *bias, eps=match.captures["eps"])


def _around_one(*bias: Var) -> OpPattern:
    """A norm whose weight is stored around zero, as Nemotron's."""
    weight = OpPattern("add", (Var("w", "weight"), Var("one", "literal")))
    return OpPattern("layer_norm", (Var("x", "value"), weight, *bias), {"eps": Var("eps")})


_OF_WIDENED = OpPattern("cast", (Var("x", "value"),), any_attrs=True)
_WIDENED = Rule(
    AnyOf(
        tuple(
            OpPattern(
                "cast",
                (OpPattern("layer_norm", (_OF_WIDENED, *weights), {"eps": Var("eps")}),),
                any_attrs=True,
            )
            for weights in ((Var("w", "weight"), Var("b", "weight")), (Var("w", "weight"),))
        )
    ),
    _fuse,
    lambda _, match: None if match.root.output.type == match.value("x").type else "",
)
"""A norm of a widened row: the op itself computes in float32 and rounds once."""

_AROUND_ONE = Rule(AnyOf((_around_one(Var("b", "weight")), _around_one())), _shift)


def _allowed(program: Program, match: Match) -> str | None:
    x, out = match.value("x"), match.root.output
    if match.captures["dims"] != (x.type.rank - 1,):
        return "the mean is not over the last dimension alone"
    for name in ("w", "b"):
        ref = match.captures.get(name)
        if isinstance(ref, WeightRef) and program.weights[ref.name].type.shape != x.type.shape[-1:]:
            return f"{ref} is not one number an element"
    if out.type != x.type or is_rounded_next(program, x, out):
        return ""
    users = program.consumers().get(out.name, [])
    biased = "b" not in match.captures and len(users) == 1 and users[0].op == "add"
    # The bias is the root of a bigger match of the same pass, unless it is not a weight.
    return "" if biased and any(isinstance(v, WeightRef) for v in users[0].inputs) else None
