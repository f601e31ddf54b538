"""Holds the matrices of the model as codes of few bits, and multiplies codes by codes."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, field
from typing import ClassVar

from ..ir.builder import ProgramBuilder, remove_dead_code
from ..ir.errors import UsageError
from ..ir.interpret import describe
from ..ir.program import Node, Operand, Program, Value, WeightExpr, WeightRef
from ..ir.schemes import MAX_EXACT_DEPTH, SCHEMES, Scheme
from ..ir.types import TensorType
from .base import Pass, PassContext, PassResult, finish
from .match import adopt_name

NONE = "none"
"""The scheme that changes nothing."""


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """`linear(%x, @w)` => `%q, %s = quantize_rows(%x);
    scaled_linear(%q, %s, @w.codes, @w.scales) {scheme = int8}`.

    Requires: unit-batch-squeezed. Ensures: nothing more (by default the scheme is none).
    Keeps: what 8 bits can say of a row: errors near 1 % of its largest value.
    Why: a decoded token reads every weight once; codes are half or less of the bytes, and integer
    products twice the rate.
    """

    scheme: str = NONE
    skip: str = ""
    head: bool = True

    name: ClassVar[str] = "quantize-weights"
    phase: ClassVar[str] = "quantize"
    contract: ClassVar[str] = "lossy"
    requires: ClassVar[frozenset[str]] = frozenset({"unit-batch-squeezed"})

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantise every matrix but routers and those that an option leaves alone."""
        if self.scheme == NONE:
            return finish(program, program, 0)
        if self.scheme not in SCHEMES:
            known = ", ".join((NONE, *SCHEMES))
            raise UsageError(f"unknown scheme {self.scheme}", where=self.name, hint=known)
        plain = _Plain(program, tuple(self.skip.split()), self.head)
        quantizing = _Quantizing(ProgramBuilder.from_program(program), SCHEMES[self.scheme])
        misses = []
        for node in program.nodes:
            reason = plain.reason(node) if node.op in _QUANTIZED else None
            if reason is not None:
                misses.append(f"{describe(node)}: {reason}")
            if reason is not None or node.op not in _QUANTIZED:
                quantizing.builder.copy(node)
            else:
                quantizing.linear(node)
        plain.require_every_pattern_used(self.name)
        result = remove_dead_code(quantizing.builder.build())
        return finish(program, result, quantizing.matches, tuple(misses))


_QUANTIZED = frozenset({"linear"})
"""Ops that have a form over codes."""


class _Plain:
    """Which matrices stay as they are, and why."""

    def __init__(self, program: Program, patterns: tuple[str, ...], head: bool) -> None:
        self.program = program
        self.patterns = patterns
        self.used: set[str] = set()
        self.routers = _behind(
            program, [x for n in program.nodes if n.op == "moe" for x in n.inputs[1:3]]
        )
        self.heads = set() if head else _behind(program, [program.outputs[0]])

    def reason(self, node: Node) -> str | None:
        """Why this product stays as it is; None where it is quantised."""
        ref = node.inputs[1]
        if not isinstance(ref, WeightRef):
            return "its matrix is computed"
        kind = self.program.weights[ref.name].type
        if not kind.dtype.is_float:
            return "its matrix is quantised already"
        matching = [p for p in self.patterns if fnmatch.fnmatchcase(ref.name, p)]
        self.used.update(matching)
        if matching:
            return f"@{ref.name} matches {matching[0]}, which is left out"
        if id(node) in self.routers:
            return "it routes tokens to experts, where a small error is another expert"
        if id(node) in self.heads:
            return "it is the head, which is left out"
        depth = kind.shape[-1]
        if not isinstance(depth, int) or depth > MAX_EXACT_DEPTH:
            return f"its rows of {depth} are longer than int32 sums hold"
        return None

    def require_every_pattern_used(self, where: str) -> None:
        """UsageError for a pattern that no matrix's name matches: nothing is ignored silently."""
        for pattern in self.patterns:
            if pattern not in self.used:
                names = [str(n.inputs[1]) for n in self.program.nodes if n.op in _QUANTIZED]
                hint = f"names look like {', '.join(names[:3])}" if names else None
                raise UsageError(f"skip: no matrix is named {pattern}", where=where, hint=hint)


def _behind(program: Program, operands: list[Operand] | list[Value]) -> set[int]:
    """The nearest linears that these operands are computed from."""
    producers = program.producers()
    found: set[int] = set()
    seen: set[str] = set()
    pending = [operand for operand in operands if isinstance(operand, Value)]
    while pending:
        value = pending.pop()
        node = producers.get(value.name)
        if node is None or value.name in seen:
            continue
        seen.add(value.name)
        if node.op == "linear":
            found.add(id(node))
        else:
            pending.extend(node.values())
    return found


@dataclass(slots=True)
class _Quantizing:
    """Emits products over codes; rows that several products read are quantised once."""

    builder: ProgramBuilder
    scheme: Scheme
    rows: dict[str, tuple[Value, Value]] = field(default_factory=dict)
    matches: int = 0

    def linear(self, node: Node) -> None:
        x, ref = node.inputs[:2]
        assert isinstance(x, Value)
        assert isinstance(ref, WeightRef)
        codes, scales = self._weight(ref)
        attrs = {"dtype": node.output.type.dtype.value, "scheme": self.scheme.name}
        operands = (*self._rows(x, node), codes, scales, *node.inputs[2:])
        mark = len(self.builder.nodes)
        made = self.builder.add(
            "scaled_linear",
            operands,
            attrs,
            names=(f"{node.output.name}.scaled",),
            layer=node.layer,
            source=node.source,
        )
        adopt_name(self.builder, mark, node.output, made.output)
        self.matches += 1

    def _rows(self, x: Value, node: Node) -> tuple[Value, Value]:
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

    def _weight(self, ref: WeightRef) -> tuple[WeightRef, WeightRef]:
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
