"""Holds the matrices of the model as codes of few bits, and multiplies codes by codes."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
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

    `rules` are pairs `pattern=scheme`, separated by spaces: a matrix whose name matches gets the
    scheme of the first such pair, and the others get `scheme`. `skip` are patterns of matrices that
    are not quantized. `head` is the scheme of the output head if no rule matches it; empty means
    `scheme`. A pattern matches the name of a weight, with or without `.weight`.

    Requires: unit-batch-squeezed. Ensures: nothing more (by default the scheme is none).
    Keeps: what the bits can say of a row: errors near 1 % of its largest value with 8, 8 % with 4.
    Why: decoding reads every weight once per token, and codes are at most half of the bytes. With
    VNNI, integer products are twice as fast as others; on AVX2, they are equally fast.
    """

    scheme: str = NONE
    rules: str = ""
    skip: str = ""
    head: str = ""

    name: ClassVar[str] = "quantize-weights"
    phase: ClassVar[str] = "quantize"
    contract: ClassVar[str] = "lossy"
    requires: ClassVar[frozenset[str]] = frozenset({"unit-batch-squeezed"})

    @property
    def allowed_error(self) -> float:
        """What the schemes may be off by."""
        named = {self.scheme, self.head, *(rule.partition("=")[2] for rule in self.rules.split())}
        return max((SCHEMES[x].tolerance for x in named if x in SCHEMES), default=self.tolerance)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantise every matrix but routers and those that an option leaves alone."""
        rules = tuple(self._rules())
        if {self.scheme, self.head or NONE, *(scheme for _, scheme in rules)} == {NONE}:
            return finish(program, program, 0)
        choices = _Choices(program, self.scheme, rules, self.head)
        quantizing = _Quantizing(ProgramBuilder.from_program(program))
        misses = []
        for node in program.nodes:
            chosen = choices.choose(node) if node.op in _QUANTIZED else None
            if isinstance(chosen, str):
                misses.append(f"{describe(node)}: {chosen}")
            if not isinstance(chosen, Scheme):
                quantizing.builder.copy(node)
            elif node.op == "linear":
                quantizing.linear(node, chosen)
            else:
                quantizing.experts(node, chosen)
        choices.require_every_pattern_used(self.name)
        result = remove_dead_code(quantizing.builder.build())
        return finish(program, result, quantizing.matches, tuple(misses))

    def _rules(self) -> Iterator[tuple[str, str]]:
        """Patterns and schemes, first those that are skipped; UsageError for an unknown scheme."""
        pairs = [(pattern, NONE) for pattern in self.skip.split()]
        for rule in self.rules.split():
            pattern, _, scheme = rule.rpartition("=")
            pairs.append((pattern, scheme))
        for name in (self.scheme, *(scheme for _, scheme in pairs), self.head or NONE):
            if name != NONE and name not in SCHEMES:
                known = ", ".join((NONE, *SCHEMES))
                raise UsageError(f"unknown scheme {name}", where=self.name, hint=known)
        return ((pattern.removeprefix("@"), scheme) for pattern, scheme in pairs)


_QUANTIZED = {"linear": (1,), "moe": (3, 4)}
"""Ops that have a form over codes, and which of their operands are matrices."""


class _Choices:
    """Which scheme each matrix gets, or why it stays as it is."""

    def __init__(
        self, program: Program, scheme: str, rules: tuple[tuple[str, str], ...], head: str
    ) -> None:
        self.program = program
        self.scheme = scheme
        self.rules = rules
        self.head = head
        self.used: set[str] = set()
        self.routers = routers(program)
        self.heads = nearest_linears(program, [program.outputs[0]])

    def choose(self, node: Node) -> Scheme | str:
        """The scheme of a product, or why it stays as it is."""
        if id(node) in self.routers:
            return "it routes tokens to experts, where a small error is another expert"
        refs = [node.inputs[place] for place in _QUANTIZED[node.op]]
        is_head = id(node) in self.heads
        found = [self._rule(ref.name, is_head) for ref in refs if isinstance(ref, WeightRef)]
        rule = next(filter(None, found), None)
        scheme, reason = self.scheme, "the scheme is none"
        if rule is not None:
            scheme, reason = rule[1], f"it matches {rule[0]}, which is left out"
        elif is_head and self.head:
            scheme, reason = self.head, "it is the head, which is left out"
        if scheme == NONE:
            return reason
        chosen = SCHEMES[scheme]
        return next(filter(None, (self._obstacle(ref, chosen) for ref in refs)), chosen)

    def _rule(self, name: str, is_head: bool) -> tuple[str, str] | None:
        """The first rule for a matrix of that name; the head is also called `lm_head`."""
        names = [name, name.removesuffix(".weight"), *(["lm_head"] if is_head else [])]
        matching = [
            rule for rule in self.rules if any(fnmatch.fnmatchcase(one, rule[0]) for one in names)
        ]
        self.used.update(pattern for pattern, _ in matching)
        return matching[0] if matching else None

    def _obstacle(self, ref: Operand, scheme: Scheme) -> str | None:
        if not isinstance(ref, WeightRef):
            return "its matrix is computed"
        kind = self.program.weights[ref.name].type
        if not kind.dtype.is_float:
            return "its matrix is quantised already"
        depth = kind.shape[-1]
        if not isinstance(depth, int) or depth > MAX_EXACT_DEPTH:
            return f"its rows of {depth} are longer than int32 sums hold"
        return None

    def require_every_pattern_used(self, where: str) -> None:
        """UsageError for a pattern that no matrix's name matches: nothing is ignored silently."""
        for pattern, scheme in self.rules:
            if pattern not in self.used:
                names = [
                    str(node.inputs[place]).removeprefix("@")
                    for node in self.program.nodes
                    for place in _QUANTIZED.get(node.op, ())
                ]
                hint = f"names look like {', '.join(names[:3])}" if names else None
                what = "skip" if scheme == NONE else "rules"
                raise UsageError(f"{what}: no matrix is named {pattern}", where=where, hint=hint)


@dataclass(slots=True)
class _Quantizing:
    """Emits products over codes; rows that several products read are quantised once."""

    builder: ProgramBuilder
    rows: dict[tuple[str, int], tuple[Value, Value]] = field(default_factory=dict)
    matches: int = 0

    def linear(self, node: Node, scheme: Scheme) -> None:
        x, matrix, *bias = node.inputs
        attrs = {"dtype": node.output.type.dtype.value}
        rows = self._rows(x, node, scheme.row_group)
        operands = (*rows, *self._weight(matrix, scheme), *bias)
        self._emit("scaled_linear", operands, attrs, node, scheme)

    def experts(self, node: Node, scheme: Scheme) -> None:
        x, index, weight, gate_up, down, *biases = node.inputs
        matrices = (*self._weight(gate_up, scheme), *self._weight(down, scheme))
        operands = (x, index, weight, *matrices, *biases)
        self._emit("scaled_moe", operands, node.attrs, node, scheme)

    def _emit(
        self,
        op: str,
        operands: tuple[Operand, ...],
        attrs: Mapping[str, Attr],
        node: Node,
        scheme: Scheme,
    ) -> None:
        mark = len(self.builder.nodes)
        made = self.builder.add(
            op,
            operands,
            {**attrs, "scheme": scheme.name},
            names=(f"{node.output.name}.scaled",),
            layer=node.layer,
            source=node.source,
        )
        adopt_name(self.builder, mark, node.output, made.output)
        self.matches += 1

    def _rows(self, x: Operand, node: Node, group: int) -> tuple[Value, Value]:
        assert isinstance(x, Value)
        key = x.name, group
        if key not in self.rows:
            made = self.builder.add(
                "quantize_rows",
                (x,),
                {"group": group} if group else {},
                names=(f"{x.name}.codes", f"{x.name}.scale"),
                layer=node.layer,
                source=node.source,
            )
            self.rows[key] = made.outputs[0], made.outputs[1]
        return self.rows[key]

    def _weight(self, ref: Operand, scheme: Scheme) -> tuple[WeightRef, WeightRef]:
        assert isinstance(ref, WeightRef)
        weight = self.builder.weights[ref.name]
        kinds: tuple[tuple[str, TensorType], ...] = (
            ("codes", scheme.weight.code_type(weight.type)),
            ("scales", scheme.weight.scale_type(weight.type)),
        )
        attrs = {"scheme": scheme.name}
        codes, scales = (
            self.builder.weight(f"{ref.name}.{op}", kind, WeightExpr(op, (weight.expr,), attrs))
            for op, kind in kinds
        )
        return codes, scales
