"""Holds the matrices of the model as codes of few bits, and multiplies codes by codes."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from ..ir.analyses import depends_only_on
from ..ir.builder import ProgramBuilder, remove_dead_code
from ..ir.errors import UsageError
from ..ir.interpret import describe
from ..ir.program import Attr, Node, Operand, Program, Value, WeightExpr, WeightRef
from ..ir.schemes import AUTO, INT8, MAX_EXACT_DEPTH, NONE, SCHEMES, Scheme, is_quantizing
from ..ir.text import print_expr
from ..ir.types import DType, TensorType
from ..ir.weights import leaves
from .base import Pass, PassContext, PassResult, finish
from .match import adopt_name
from .routers import nearest_linears, routers

_TOKENS = "input_ids"


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """`linear(%x, @w)` => `%q, %s = quantize_rows(%x);
    scaled_linear(%q, %s, @w.codes, @w.scales) {scheme = int8}`.

    `rules` are pairs `pattern=scheme`, separated by spaces: a matrix whose name matches gets the
    scheme of the first such pair, and the others get `scheme`. `skip` are patterns of matrices that
    are not quantized, whatever the rules say. Each pattern must decide about a matrix, and both
    matrices of a mixture of experts must get the same scheme. `head` is the scheme of the output
    head if no rule matches it; empty means `scheme`. `embedding` is the scheme of a table in which
    tokens are looked up, which becomes `scaled_embedding(@w.codes, @w.scales, %ids)`; `auto` means
    that of the head if it is the same matrix, so that both read the same codes, and int8 otherwise.
    Other tables are quantized if a rule says so. A pattern matches the name of a weight, with or
    without `.weight`.

    Requires: unit-batch-squeezed. Ensures: nothing more (by default the scheme is none).
    Keeps: what the bits can say of a row: errors near 1 % of its largest value with 8, 8 % with 4.
    Why: decoding reads every weight once per token, and codes are at most half of the bytes. With
    VNNI, integer products are twice as fast as others; on AVX2, they are equally fast. An embedding
    takes up to a third of a small model, and twice that if the head is a copy in another format.
    """

    scheme: str = NONE
    rules: str = ""
    skip: str = ""
    head: str = ""
    embedding: str = AUTO

    name: ClassVar[str] = "quantize-weights"
    phase: ClassVar[str] = "quantize"
    contract: ClassVar[str] = "lossy"
    requires: ClassVar[frozenset[str]] = frozenset({"unit-batch-squeezed"})

    @property
    def allowed_error(self) -> float:
        """What the schemes may be off by."""
        named = {
            self.scheme,
            self.head,
            self.embedding,
            *(scheme for _, scheme in _parse_rules(self.rules)),
        }
        return max((SCHEMES[x].tolerance for x in named if x in SCHEMES), default=self.tolerance)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantise every matrix but routers and those that an option leaves alone."""
        rules = tuple(self._rules())
        if not rules and not is_quantizing(self.scheme, self.head, self.embedding):
            return finish(program, program, 0)
        num_skipped = len(self.skip.split())
        choices = _Choices(program, self.scheme, rules, num_skipped, self.head, self.embedding)
        quantizing = _Quantizing(ProgramBuilder.from_program(program))
        misses = []
        for node in program.nodes:
            chosen = choices.choose(node)
            if isinstance(chosen, str):
                misses.append(f"{describe(node)}: {chosen}")
            if not isinstance(chosen, Scheme):
                quantizing.copy(node)
            elif node.op == "linear":
                quantizing.linear(node, chosen)
            elif node.op == "embedding":
                quantizing.embedding(node, choices.table(node), chosen)
            else:
                quantizing.experts(node, chosen)
        choices.require_every_pattern_used(self.name)
        result = remove_dead_code(quantizing.builder.build())
        return finish(program, result, quantizing.matches, tuple(misses))

    def _rules(self) -> Iterator[tuple[str, str]]:
        """Patterns and schemes, first those that are skipped; UsageError for an unknown scheme."""
        pairs = [(pattern, NONE) for pattern in self.skip.split()]
        pairs += _parse_rules(self.rules)
        named = (self.scheme, *(scheme for _, scheme in pairs), self.head or NONE)
        for name in (*named, NONE if self.embedding == AUTO else self.embedding):
            if name != NONE and name not in SCHEMES:
                known = ", ".join((NONE, *SCHEMES))
                raise UsageError(f"unknown scheme {name}", where=self.name, hint=known)
        return ((pattern.removeprefix("@"), scheme) for pattern, scheme in pairs)


def _parse_rules(text: str) -> list[tuple[str, str]]:
    """Patterns and schemes of `pattern=scheme`, separated by spaces."""
    return [(pattern, scheme) for pattern, _, scheme in (x.rpartition("=") for x in text.split())]


_QUANTIZED = {"linear": (1,), "moe": (3, 4), "embedding": (0,)}
"""Ops that have a form over codes, and which of their operands are matrices."""


class _Choices:
    """Which scheme each matrix gets, or why it stays as it is.

    `used` has the indices of rules that decided about a matrix, and `lost` those that matched one
    without deciding, with a reason.
    """

    def __init__(
        self,
        program: Program,
        scheme: str,
        rules: tuple[tuple[str, str], ...],
        num_skipped: int,
        head: str,
        embedding: str,
    ) -> None:
        self.program = program
        self.scheme = scheme
        self.rules = rules
        self.num_skipped = num_skipped
        self.head = head
        self.embedding = embedding
        self.used: set[int] = set()
        self.lost: dict[int, str] = {}
        self.routers = routers(program)
        self.heads = nearest_linears(program, [program.outputs[0]])
        self.of_tokens = {_TOKENS, *depends_only_on(program, [_TOKENS])}
        self.products: dict[str, Node] = {}
        for node in program.nodes:
            if node.op == "linear" and isinstance(ref := node.inputs[1], WeightRef):
                self.products.setdefault(self._matrix(ref), node)

    def choose(self, node: Node) -> Scheme | str | None:
        """The scheme of a matrix, or why it stays as it is; None for an op that reads none."""
        if node.op == "embedding":
            return self._choose_table(node)
        return self._choose_product(node) if node.op in _QUANTIZED else None

    def table(self, node: Node) -> WeightRef:
        """The matrix that an embedding looks up rows in: under the name that a product reads."""
        ref = node.inputs[0]
        assert isinstance(ref, WeightRef)
        product = self._product(ref)
        shared = ref if product is None else product.inputs[1]
        assert isinstance(shared, WeightRef)
        return shared

    def _product(self, table: WeightRef) -> Node | None:
        """The first product that multiplies by the matrix that a table is."""
        return self.products.get(self._matrix(table))

    def _matrix(self, ref: WeightRef) -> str:
        """What a matrix is before its type is changed: in codes, both are the same matrix."""
        expr = self.program.weights[ref.name].expr
        while expr.op == "cast":
            (expr,) = expr.inputs
        return print_expr(expr)

    def _choose_table(self, node: Node) -> Scheme | str | None:
        """As `choose`; None as well for a table that was computed when compiling."""
        ref = node.inputs[0]
        if not isinstance(ref, WeightRef) or not _is_stored(self.program.weights[ref.name].expr):
            return None
        rule = self._rule(ref.name, is_head=False)
        scheme, reason = INT8.name, ""
        if rule is not None:
            scheme, reason = rule[1], f"it matches {rule[0]}, which is left out"
        elif getattr(node.inputs[1], "name", None) not in self.of_tokens:
            return "no tokens are looked up in it"
        elif self.embedding != AUTO:
            scheme, reason = self.embedding, "it is the embedding, which is left out"
        elif (product := self._product(ref)) is not None:
            chosen = self._choose_product(product)
            return chosen if isinstance(chosen, Scheme) else f"a product reads it, and {chosen}"
        elif self.scheme == NONE:
            scheme, reason = NONE, "the scheme is none"
        if scheme == NONE:
            return reason
        return self._obstacle(self.table(node), SCHEMES[scheme]) or SCHEMES[scheme]

    def _choose_product(self, node: Node) -> Scheme | str:
        refs = [node.inputs[place] for place in _QUANTIZED[node.op]]
        is_head = id(node) in self.heads
        if id(node) in self.routers:
            return self._router(refs)
        found = [self._scheme(ref, is_head) for ref in refs]
        (scheme, reason), *others = found
        if any(other != scheme for other, _ in others):
            given = " and ".join(f"{a} is {b}" for a, (b, _) in zip(refs, found, strict=True))
            raise UsageError(
                f"{given}, but the matrices of a mixture of experts must have the same scheme",
                where=QuantizeWeights.name,
                hint="write a rule that matches both",
            )
        if scheme == NONE:
            return reason
        chosen = SCHEMES[scheme]
        return next(filter(None, (self._obstacle(ref, chosen) for ref in refs)), chosen)

    def _scheme(self, ref: Operand, is_head: bool) -> tuple[str, str]:
        """The scheme of a matrix of a product, and what to say if it is none."""
        rule = self._rule(ref.name, is_head) if isinstance(ref, WeightRef) else None
        if rule is not None:
            return rule[1], f"it matches {rule[0]}, which is left out"
        if is_head and self.head:
            return self.head, "it is the head, which is left out"
        return self.scheme, "the scheme is none"

    def _router(self, refs: list[Operand]) -> str:
        """Why a router stays as it is; a rule that leaves it out has had its effect."""
        for ref in refs:
            for place in self._matching(ref.name, False) if isinstance(ref, WeightRef) else ():
                if self.rules[place][1] == NONE:
                    self.used.add(place)
                else:
                    self.lost.setdefault(place, f"{ref} routes tokens to experts")
        return "it routes tokens to experts, where a small error is another expert"

    def _matching(self, name: str, is_head: bool) -> list[int]:
        """The rules for a matrix of that name; the head is also called `lm_head`."""
        names = [name, name.removesuffix(".weight"), *(["lm_head"] if is_head else [])]
        return [
            place
            for place, (pattern, _) in enumerate(self.rules)
            if any(fnmatch.fnmatchcase(one, pattern) for one in names)
        ]

    def _rule(self, name: str, is_head: bool) -> tuple[str, str] | None:
        """The first rule for a matrix of that name."""
        matching = self._matching(name, is_head)
        if not matching:
            return None
        first, *others = matching
        self.used.add(first)
        for place in others:
            self.lost.setdefault(place, f"{name} matches {self.rules[first][0]} before it")
        return self.rules[first]

    def _obstacle(self, ref: Operand, scheme: Scheme) -> str | None:
        if not isinstance(ref, WeightRef):
            return "its matrix is computed"
        kind = self.program.weights[ref.name].type
        if not kind.dtype.is_float:
            return "its matrix is quantised already"
        depth = kind.shape[-1]
        if not isinstance(depth, int):
            return "its rows have no fixed length"
        if scheme.is_exact and depth > MAX_EXACT_DEPTH:
            return f"its rows of {depth} are longer than int32 sums hold"
        return None

    def require_every_pattern_used(self, where: str) -> None:
        """UsageError for a pattern that decides about no matrix: nothing is ignored silently."""
        for place, (pattern, _) in enumerate(self.rules):
            what = "skip" if place < self.num_skipped else "rules"
            if place in self.lost and place not in self.used:
                raise UsageError(
                    f"{what}: {pattern} has no effect: {self.lost[place]}",
                    where=where,
                    hint="the first pattern that matches a name is used, those of skip before"
                    " rules: put it first, or remove it",
                )
            if place not in self.used:
                names = [
                    str(node.inputs[place]).removeprefix("@")
                    for node in self.program.nodes
                    if node.op != "embedding"
                    for place in _QUANTIZED.get(node.op, ())
                ]
                hint = f"names look like {', '.join(names[:3])}" if names else None
                raise UsageError(f"{what}: no matrix is named {pattern}", where=where, hint=hint)


def _is_stored(expr: WeightExpr) -> bool:
    return any(leaf.op == "checkpoint" for leaf in leaves(expr))


@dataclass(slots=True)
class _Quantizing:
    """Emits products over codes; rows that several products read are quantised once.

    `wide` has by name what was rounded to 16 bits as a row of a table, and is float32 now.
    """

    builder: ProgramBuilder
    rows: dict[tuple[str, int], tuple[Value, Value]] = field(default_factory=dict)
    wide: dict[str, Value] = field(default_factory=dict)
    matches: int = 0

    def copy(self, node: Node) -> None:
        """A node as it is, but for a cast of what is float32 already."""
        source = node.inputs[0] if node.op == "cast" else None
        wide = self.wide.get(source.name) if isinstance(source, Value) else None
        if wide is not None and node.output.type.dtype is DType.F32:
            self.builder.replace(node.output, wide)
        else:
            self.builder.copy(node)

    def embedding(self, node: Node, matrix: WeightRef, scheme: Scheme) -> None:
        """Rows in float32, for all that would widen them at once."""
        kind = node.output.type
        mark = len(self.builder.nodes)
        made = self.builder.add(
            "scaled_embedding",
            (*self._weight(matrix, scheme), node.inputs[1]),
            {"dtype": DType.F32.value, "scheme": scheme.name, "width": kind.shape[-1]},
            names=(f"{node.output.name}.scaled",),
            layer=node.layer,
            source=node.source,
        ).output
        if kind.dtype is not DType.F32:
            self.wide[node.output.name] = made
            made = self.builder.emit("cast", made, dtype=kind.dtype.value)
        adopt_name(self.builder, mark, node.output, made)
        self.matches += 1

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
            self._entry(ref.name, scheme, kind, WeightExpr(op, (weight.expr,), attrs))
            for op, kind in kinds
        )
        return codes, scales

    def _entry(self, name: str, scheme: Scheme, kind: TensorType, expr: WeightExpr) -> WeightRef:
        """An entry of the weight table; a table and a head may differ in the scheme."""
        plain = f"{name}.{expr.op}"
        known = self.builder.weights.get(plain)
        is_other = known is not None and known.expr != expr
        return self.builder.weight(
            f"{name}.{scheme.name}.{expr.op}" if is_other else plain, kind, expr
        )
