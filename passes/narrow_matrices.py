"""Holds the matrices of a model that computes in float32 in the 16 bits that its recipe chose."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Final

from ..ir.builder import ProgramBuilder, remove_dead_code
from ..ir.errors import UsageError
from ..ir.program import Node, Program, Weight, WeightExpr, WeightRef
from ..ir.types import DType
from ..ir.weights import infer_weight
from .base import Pass, PassContext, PassResult, finish
from .match import adopt_name
from .near_miss import NearMiss
from .nearest_products import routers

_NARROW: Final = frozenset({DType.BF16, DType.F16})
_ARRANGING: Final = frozenset({"concat", "reshape", "slice", "stack", "transpose"})
"""Weight ops that move numbers and leave them as they are."""
_MATRICES: Final = {"linear": (1,), "moe": (3, 4), "embedding": (0,)}
"""Ops that read matrices of either width, and which of their operands these are."""


@dataclass(frozen=True)
class NarrowMatrices(Pass):
    """`linear(%x, @w) : f32[T, 8]` with `@w: f32[8, 8]` => the same with `@w: bf16[8, 8]`.

    Requires: unit-batch-squeezed. Ensures: nothing more (by default of the type in the spec).
    Keeps: reassociates: rows are rounded to the type of the matrix, and nothing else is rounded.
    Why: decoding reads every weight once per token, and 16-bit products are faster; what is kept
    between products is small beside the weights, and rounding it costs more accuracy than that.
    """

    dtype: str = "auto"

    name: ClassVar[str] = "narrow-matrices"
    phase: ClassVar[str] = "quantize"
    contract: ClassVar[str] = "reassociates"
    requires: ClassVar[frozenset[str]] = frozenset({"unit-batch-squeezed"})

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Narrow every float32 matrix but those of routers and tables that would lose by it."""
        dtype = self._dtype(program)
        if dtype is None:
            return finish(program, program, 0)
        return _Narrowing(program, dtype).run()

    def _dtype(self, program: Program) -> DType | None:
        name = program.spec.dtype if self.dtype == "auto" else self.dtype
        if name in {kind.value for kind in _NARROW}:
            return DType(name)
        if self.dtype not in ("auto", DType.F32.value):
            raise UsageError(
                f"dtype is {self.dtype}, expected auto, bf16, f16 or f32", where=self.name
            )
        return None


class _Narrowing:
    """One run: which nodes read which narrow matrices."""

    def __init__(self, program: Program, dtype: DType) -> None:
        self.program, self.dtype = program, dtype
        self.builder = ProgramBuilder.from_program(program)
        self.routers = routers(program)
        self.misses: list[NearMiss] = []
        self.chosen = {id(node) for node in program.nodes if self._is_chosen(node)}
        self.elsewhere = {
            operand.name
            for node in program.nodes
            for place, operand in enumerate(node.inputs)
            if isinstance(operand, WeightRef)
            and (id(node) not in self.chosen or place not in _MATRICES[node.op])
        }

    def run(self) -> PassResult:
        for node in self.program.nodes:
            if id(node) in self.chosen:
                self._narrow(node)
            else:
                self.builder.copy(node)
        result = remove_dead_code(self.builder.build())
        return finish(self.program, result, len(self.chosen), tuple(self.misses))

    def _is_chosen(self, node: Node) -> bool:
        places = _MATRICES.get(node.op, ())
        refs = [node.inputs[place] for place in places]
        weights = [self.program.weights[ref.name] for ref in refs if isinstance(ref, WeightRef)]
        if not weights or len(weights) < len(places):
            return False
        if any(weight.type.dtype is not DType.F32 for weight in weights):
            return False
        if id(node) in self.routers:
            reason = "it routes tokens to experts, where a small error is another expert"
        elif node.op == "embedding" and not self._holds(weights[0].expr):
            reason = f"@{weights[0].name} has numbers that {self.dtype.value} does not hold"
        else:
            return True
        self.misses.append(NearMiss.at(node, reason))
        return False

    def _narrow(self, node: Node) -> None:
        operands = list(node.inputs)
        for place in _MATRICES[node.op]:
            ref = operands[place]
            assert isinstance(ref, WeightRef)
            operands[place] = self._matrix(ref)
        mark = len(self.builder.nodes)
        made = self.builder.add(
            node.op,
            operands,
            node.attrs,
            names=(f"{node.output.name}.narrow",),
            layer=node.layer,
            source=node.source,
        ).output
        if made.type != node.output.type:  # rows of a table are of its type
            made = self.builder.add(
                "cast",
                (made,),
                {"dtype": node.output.type.dtype.value},
                layer=node.layer,
                source=node.source,
            ).output
        adopt_name(self.builder, mark, node.output, made)

    def _matrix(self, ref: WeightRef) -> WeightRef:
        """The narrow weight: under the name of the wide one where nothing else reads that."""
        wide = self.program.weights[ref.name]
        kind = replace(wide.type, dtype=self.dtype)
        expr = self._narrowed(wide.expr)
        if ref.name in self.elsewhere:
            return self.builder.weight(f"{ref.name}.{self.dtype.value}", kind, expr)
        self.builder.weights[ref.name] = Weight(ref.name, kind, expr)
        return ref

    def _holds(self, expr: WeightExpr) -> bool:
        """Whether the narrow type has every number of a weight."""
        if expr.op in _ARRANGING:
            return all(map(self._holds, expr.inputs))
        return self._inner(expr) is not None

    def _narrowed(self, expr: WeightExpr) -> WeightExpr:
        """The expression in the narrow type, not by way of the wide one where that can be."""
        inner = self._inner(expr)
        if inner is not None:
            return inner
        if expr.op in _ARRANGING and self._holds(expr):
            return replace(expr, inputs=tuple(map(self._narrowed, expr.inputs)))
        return WeightExpr("cast", (expr,), {"dtype": self.dtype.value})

    def _inner(self, expr: WeightExpr) -> WeightExpr | None:
        """What was widened, where that is all there is to an expression."""
        if expr.op != "cast" or expr.attrs["dtype"] != DType.F32.value:
            return None
        (inner,) = expr.inputs
        kind = infer_weight(inner)
        return inner if kind is not None and kind.dtype is self.dtype else None
