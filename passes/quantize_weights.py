"""Holds the matrices of the model as codes of few bits, and multiplies codes by codes."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from ..ir.builder import ProgramBuilder, remove_dead_code
from ..ir.errors import UsageError
from ..ir.interpret import describe
from ..ir.program import Attr, Node, Operand, Program, Value, WeightExpr, WeightRef
from ..ir.schemes import MAX_EXACT_DEPTH, SCHEMES, Scheme
from ..ir.types import TensorType
from .base import Pass, PassContext, PassResult, finish
from .match import adopt_name
from .routers import nearest_linears, routers

NONE = "none"
"""The scheme that changes nothing."""


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """`linear(%x, @w)` => `%q, %s = quantize_rows(%x);
    scaled_linear(%q, %s, @w.codes, @w.scales) {scheme = int8}`.

    Requires: unit-batch-squeezed. Ensures: nothing more (by default the scheme is none).
    Keeps: what the bits can say of a row: errors near 1 % of its largest value with 8, 8 % with 4.
    Why: decoding reads every weight once per token, and codes are at most half of the bytes. With
    VNNI, integer products are twice as fast as others; on AVX2, they are equally fast.
    """

    scheme: str = NONE
    skip: str = ""
    head: bool = True

    name: ClassVar[str] = "quantize-weights"
    phase: ClassVar[str] = "quantize"
    contract: ClassVar[str] = "lossy"
    requires: ClassVar[frozenset[str]] = frozenset({"unit-batch-squeezed"})

    @property
    def allowed_error(self) -> float:
        """What the scheme may be off by."""
        return SCHEMES[self.scheme].tolerance if self.scheme in SCHEMES else self.tolerance

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantise every matrix but routers and those that an option leaves alone."""
        if self.scheme == NONE:
            return finish(program, program, 0)
        if self.scheme not in SCHEMES:
            known = ", ".join((NONE, *SCHEMES))
            raise UsageError(f"unknown scheme {self.scheme}", where=self.name, hint=known)
        patterns = tuple(pattern.removeprefix("@") for pattern in self.skip.split())
        plain = _Plain(program, patterns, self.head)
        quantizing = _Quantizing(ProgramBuilder.from_program(program), SCHEMES[self.scheme])
        misses = []
        for node in program.nodes:
            reason = plain.reason(node) if node.op in _QUANTIZED else None
            if reason is not None:
                misses.append(f"{describe(node)}: {reason}")
            if reason is not None or node.op not in _QUANTIZED:
                quantizing.builder.copy(node)
            elif node.op == "linear":
                quantizing.linear(node)
            else:
                quantizing.experts(node)
        plain.require_every_pattern_used(self.name)
        result = remove_dead_code(quantizing.builder.build())
        return finish(program, result, quantizing.matches, tuple(misses))


_QUANTIZED = {"linear": (1,), "moe": (3, 4)}
"""Ops that have a form over codes, and which of their operands are matrices."""


class _Plain:
    """Which matrices stay as they are, and why."""

    def __init__(self, program: Program, patterns: tuple[str, ...], head: bool) -> None:
        self.program = program
        self.patterns = patterns
        self.used: set[str] = set()
        self.routers = routers(program)
        self.heads = set() if head else nearest_linears(program, [program.outputs[0]])

    def reason(self, node: Node) -> str | None:
        """Why this node stays as it is; None where it is quantised."""
        if id(node) in self.routers:
            return "it routes tokens to experts, where a small error is another expert"
        if id(node) in self.heads:
            return "it is the head, which is left out"
        reasons = [self._matrix(node.inputs[place]) for place in _QUANTIZED[node.op]]
        return next(filter(None, reasons), None)

    def _matrix(self, ref: Operand) -> str | None:
        if not isinstance(ref, WeightRef):
            return "its matrix is computed"
        kind = self.program.weights[ref.name].type
        if not kind.dtype.is_float:
            return "its matrix is quantised already"
        matching = [p for p in self.patterns if fnmatch.fnmatchcase(ref.name, p)]
        self.used.update(matching)
        if matching:
            return f"@{ref.name} matches {matching[0]}, which is left out"
        depth = kind.shape[-1]
        if not isinstance(depth, int) or depth > MAX_EXACT_DEPTH:
            return f"its rows of {depth} are longer than int32 sums hold"
        return None

    def require_every_pattern_used(self, where: str) -> None:
        """UsageError for a pattern that no matrix's name matches: nothing is ignored silently."""
        for pattern in self.patterns:
            if pattern not in self.used:
                names = [
                    str(node.inputs[place]).removeprefix("@")
                    for node in self.program.nodes
                    for place in _QUANTIZED.get(node.op, ())
                ]
                hint = f"names look like {', '.join(names[:3])}" if names else None
                raise UsageError(f"skip: no matrix is named {pattern}", where=where, hint=hint)


@dataclass(slots=True)
class _Quantizing:
    """Emits products over codes; rows that several products read are quantised once."""

    builder: ProgramBuilder
    scheme: Scheme
    rows: dict[str, tuple[Value, Value]] = field(default_factory=dict)
    matches: int = 0

    def linear(self, node: Node) -> None:
        x, matrix, *bias = node.inputs
        attrs = {"dtype": node.output.type.dtype.value}
        self._emit(
            "scaled_linear", (*self._rows(x, node), *self._weight(matrix), *bias), attrs, node
        )

    def experts(self, node: Node) -> None:
        x, index, weight, gate_up, down, *biases = node.inputs
        matrices = (*self._weight(gate_up), *self._weight(down))
        self._emit("scaled_moe", (x, index, weight, *matrices, *biases), node.attrs, node)

    def _emit(
        self, op: str, operands: tuple[Operand, ...], attrs: Mapping[str, Attr], node: Node
    ) -> None:
        mark = len(self.builder.nodes)
        made = self.builder.add(
            op,
            operands,
            {**attrs, "scheme": self.scheme.name},
            names=(f"{node.output.name}.scaled",),
            layer=node.layer,
            source=node.source,
        )
        adopt_name(self.builder, mark, node.output, made.output)
        self.matches += 1

    def _rows(self, x: Operand, node: Node) -> tuple[Value, Value]:
        assert isinstance(x, Value)
        if x.name not in self.rows:
            made = self.builder.add(
                "quantize_rows",
                (x,),
                names=(f"{x.name}.codes", f"{x.name}.scale"),
                layer=node.layer,
                source=node.source,
            )
            self.rows[x.name] = made.outputs[0], made.outputs[1]
        return self.rows[x.name]

    def _weight(self, ref: Operand) -> tuple[WeightRef, WeightRef]:
        assert isinstance(ref, WeightRef)
        weight = self.builder.weights[ref.name]
        kinds: tuple[tuple[str, TensorType], ...] = (
            ("codes", self.scheme.code_type(weight.type)),
            ("scales", self.scheme.scale_type(weight.type)),
        )
        attrs = {"scheme": self.scheme.name}
        codes, scales = (
            self.builder.weight(f"{ref.name}.{op}", kind, WeightExpr(op, (weight.expr,), attrs))
            for op, kind in kinds
        )
        return codes, scales
