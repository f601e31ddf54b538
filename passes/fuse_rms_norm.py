"""Recognises RMS normalisation, in the form of Llama and in that of Gemma."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.program import Operand, Program, Value, Weight, WeightExpr, WeightRef
from ..ir.types import DType, TensorType
from .base import Pass, PassContext, PassResult, finish
from .match import (
    AnyOf,
    Match,
    Maybe,
    NodeEmitter,
    OpPattern,
    PatternLike,
    Rule,
    Var,
    optional_cast,
    rewrite_all,
)


@dataclass(frozen=True)
class FuseRmsNorm(Pass):
    """`mul(@w, mul(%x, rsqrt(add(mean(pow(%x, 2)), 1e-6))))` => `rms_norm(%x, @w) {eps = 1e-6}`.

    Requires: unit-batch-squeezed. Ensures: norms-fused.
    Keeps: reassociates (in 16-bit types fewer roundings); `1 + w` becomes a weight of its own.
    Why: one read and one write of the row instead of five of each.
    """

    name: ClassVar[str] = "fuse-rms-norm"
    phase: ClassVar[str] = "fuse"
    contract: ClassVar[str] = "reassociates"
    requires: ClassVar[frozenset[str]] = frozenset({"unit-batch-squeezed"})
    ensures: ClassVar[frozenset[str]] = frozenset({"norms-fused"})

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Fuse every norm over the last dimension."""
        swept = rewrite_all(program, [_LLAMA, _GEMMA])
        return finish(program, swept.program, swept.matches, swept.near_misses)


def _normed() -> PatternLike:
    """x * rsqrt(mean(x²) + eps), with x perhaps widened first."""
    wide = Maybe("cast", Var("x", "value"))
    squares = AnyOf((OpPattern("pow", (wide, 2)), OpPattern("mul", (wide, wide))))
    mean = OpPattern("mean", (squares,), {"dims": Var("dims"), "keepdim": True})
    shifted = OpPattern("add", (mean, Var("eps", "literal")))
    root = AnyOf((OpPattern("rsqrt", (shifted,)), OpPattern("pow", (shifted, -0.5))))
    return OpPattern("mul", (wide, root))


def _allowed(program: Program, match: Match) -> str | None:
    """Why the match is not a norm over the last dimension with a plain weight."""
    x, out = match.value("x"), match.root.output
    weight = match.captures["w"]
    if match.captures["dims"] != (x.type.rank - 1,):
        return "the mean is not over the last dimension alone"
    kind = program.weights[weight.name].type
    if kind.shape != x.type.shape[-1:]:
        return f"the weight {weight} is {kind}, not one number an element"
    # The product in float32 whose cast is the norm: the cast will be met as a root of its own.
    return "" if out.type != x.type or is_rounded_next(program, x, out) else None


def is_rounded_next(program: Program, x: Value, out: Value) -> bool:
    """Whether x was widened only for this norm, whose one reader narrows it to what x was."""
    widened = program.producers().get(x.name)
    users = program.consumers().get(out.name, [])
    if widened is None or widened.op != "cast" or len(users) != 1 or users[0].op != "cast":
        return False
    return users[0].output.type == program.operand_type(widened.inputs[0])


def _llama(emit: NodeEmitter, match: Match) -> Operand:
    eps = float(match.captures["eps"])
    x, weight = match.value("x"), match.operand("w")
    return emit("rms_norm", x, weight, eps=eps, round_before_scale=True)


def _gemma(emit: NodeEmitter, match: Match) -> Operand:
    eps = float(match.captures["eps"])
    weight = match.operand("w")
    assert isinstance(weight, WeightRef)
    if "one" in match.captures:
        weight = shifted_weight(emit, weight, float(match.captures["one"]))
    return emit("rms_norm", match.value("x"), weight, eps=eps, round_before_scale=False)


def shifted_weight(emit: NodeEmitter, ref: WeightRef, value: float) -> WeightRef:
    """The weight `ref + value`, made once at compile time, in float32 as the model adds it."""
    weight: Weight = emit.builder.weights[ref.name]
    wide = WeightExpr("cast", (weight.expr,), {"dtype": "f32"})
    expr = WeightExpr("add", (wide,), {"value": value})
    kind = TensorType(DType.F32, weight.type.shape)
    return emit.builder.weight(f"{ref.name}.plus_{value:g}", kind, expr)


_WEIGHT = Var("w", "weight")
_LLAMA = Rule(OpPattern("mul", (_WEIGHT, optional_cast(_normed()))), _llama, _allowed)
_SHIFTED = AnyOf(
    (OpPattern("add", (Var("one", "literal"), optional_cast(_WEIGHT))), optional_cast(_WEIGHT))
)
_SCALED = OpPattern("mul", (_normed(), _SHIFTED))
_GEMMA = Rule(AnyOf((OpPattern("cast", (_SCALED,)), _SCALED)), _gemma, _allowed)
"""Gemma rounds after the weight; where nothing is rounded both say the same."""
