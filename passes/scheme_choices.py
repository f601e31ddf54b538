"""Which scheme each matrix of a program gets: by rules, or as head, table or any other product."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from ..ir.analyses import depends_only_on
from ..ir.errors import UsageError
from ..ir.program import Node, Operand, Program, WeightExpr, WeightRef
from ..ir.schemes import INT8, MAX_EXACT_DEPTH, SCHEMES, Scheme
from ..ir.text import print_expr
from ..ir.weights import leaves
from .base import Pass
from .routers import nearest_products, routers

NONE: Final = "none"
"""The scheme that changes nothing."""
AUTO: Final = "auto"
"""The scheme of an embedding that is chosen by what else reads its table."""
ADOPT: Final = "adopt"
"""The scheme of a matrix that a file holds in a format of ours: its codes are kept."""
_TOKENS = "input_ids"

QUANTIZED: Final = {"linear": (1,), "moe": (3, 4), "embedding": (0,)}
"""Ops that have a form over codes, and which of their operands are matrices."""
_CODED: Final = {"scaled_linear": (2,), "scaled_moe": (3, 5), "scaled_embedding": (0,)}
"""The forms over codes, and which of their operands are these."""

Pick = Callable[[Node, str, Sequence[Operand]], Scheme | str]
"""Told a node, the name of the scheme that was chosen for it (not `none`) and its matrices, gives
the scheme, or why the matrices stay as they are."""


@dataclass(frozen=True)
class SchemePass(Pass):
    """A pass that chooses schemes by the options that `QuantizeWeights` describes."""

    scheme: str = NONE
    rules: str = ""
    skip: str = ""
    head: str = ""
    embedding: str = AUTO

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Patterns and schemes, first those that are skipped; UsageError for an unknown scheme."""
        pairs = [(pattern, NONE) for pattern in self.skip.split()]
        for rule in self.rules.split():
            pattern, _, scheme = rule.rpartition("=")
            pairs.append((pattern, scheme))
        known = (NONE, ADOPT, *SCHEMES)
        for name in (*self.named(), *(scheme for _, scheme in pairs)):
            if name not in known:
                raise UsageError(f"unknown scheme {name}", where=self.name, hint=", ".join(known))
        return tuple((pattern.removeprefix("@"), scheme) for pattern, scheme in pairs)

    def named(self) -> set[str]:
        """Every scheme that an option names."""
        table = NONE if self.embedding == AUTO else self.embedding
        rules = (rule.rpartition("=")[2] for rule in self.rules.split())
        return {self.scheme, self.head or NONE, table, *rules}


class SchemeChoices:
    """Which scheme each matrix gets, or why it stays as it is.

    `options` are those of the pass; `pick` has the last word on a scheme that was chosen.
    """

    def __init__(self, program: Program, options: SchemePass, pick: Pick) -> None:
        self.program = program
        self.scheme = options.scheme
        self.rules = options.pairs()
        self.head = options.head
        self.embedding = options.embedding
        self.pick = pick
        self.used: set[str] = set()
        self.routers = routers(program)
        self.heads = nearest_products(program, [program.outputs[0]])
        self.of_tokens = {_TOKENS, *depends_only_on(program, [_TOKENS])}
        self.products: dict[str, Node] = {}
        for node in program.nodes:
            if node.op == "linear" and isinstance(ref := node.inputs[1], WeightRef):
                self.products.setdefault(self._matrix(ref), node)

    def choose(self, node: Node) -> Scheme | str | None:
        """The scheme of a matrix, or why it stays as it is; None for an op that reads none."""
        for place in _CODED.get(node.op, ()):  # a rule for what is in codes already has its use
            name = str(node.inputs[place]).removeprefix("@").removesuffix(".codes")
            self._rule(name, id(node) in self.heads)
        if node.op == "embedding":
            return self._choose_table(node)
        return self._choose_product(node) if node.op in QUANTIZED else None

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
        scheme, reason = ADOPT if self.scheme == ADOPT else INT8.name, ""
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
        return self._picked(node, scheme, [self.table(node)])

    def _choose_product(self, node: Node) -> Scheme | str:
        if id(node) in self.routers:
            return "it routes tokens to experts, where a small error is another expert"
        refs = [node.inputs[place] for place in QUANTIZED[node.op]]
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
        return self._picked(node, scheme, refs)

    def _picked(self, node: Node, scheme: str, matrices: Sequence[Operand]) -> Scheme | str:
        obstacles = (self._obstacle(ref) for ref in matrices)
        return next(filter(None, obstacles), None) or self.pick(node, scheme, matrices)

    def _rule(self, name: str, is_head: bool) -> tuple[str, str] | None:
        """The first rule for a matrix of that name; the head is also called `lm_head`."""
        names = [name, name.removesuffix(".weight"), *(["lm_head"] if is_head else [])]
        matching = [
            rule for rule in self.rules if any(fnmatch.fnmatchcase(one, rule[0]) for one in names)
        ]
        self.used.update(pattern for pattern, _ in matching)
        return matching[0] if matching else None

    def _obstacle(self, ref: Operand) -> str | None:
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
                    if node.op != "embedding"
                    for place in QUANTIZED.get(node.op, ())
                ]
                hint = f"names look like {', '.join(names[:3])}" if names else None
                what = "skip" if scheme == NONE else "rules"
                raise UsageError(f"{what}: no matrix is named {pattern}", where=where, hint=hint)


def stored_formats(exprs: Iterable[WeightExpr]) -> set[str]:
    """The formats of few bits in which a file holds what these expressions read."""
    found = (leaf.attrs.get("stored") for expr in exprs for leaf in leaves(expr))
    return {str(one) for one in found if one is not None}


def matrix_exprs(program: Program, matrices: Sequence[Operand]) -> list[WeightExpr]:
    """The expressions of operands that are entries of the weight table."""
    return [program.weights[ref.name].expr for ref in matrices if isinstance(ref, WeightRef)]


def _is_stored(expr: WeightExpr) -> bool:
    return any(leaf.op == "checkpoint" for leaf in leaves(expr))
