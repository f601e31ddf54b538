"""Which scheme each matrix of a program gets: by rules, or as head, table or any other product."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from ..ir.analyses import depends_only_on
from ..ir.errors import UsageError
from ..ir.program import LOGITS, Node, Operand, Program, WeightExpr, WeightRef
from ..ir.schemes import (
    ADOPTING,
    AUTO,
    INT8,
    MAX_EXACT_DEPTH,
    NONE,
    SCHEMES,
    Scheme,
    eight_bits,
    has_few_bits,
    has_four_bits,
    is_fp8,
    is_quantizing,
)
from ..ir.text import print_expr
from ..ir.weights import leaves
from .base import Pass
from .nearest_products import (
    attention_products,
    feed_forward_products,
    nearest_products,
    query_products,
    routers,
)
from .pattern_uses import UnusedPattern

_TOKENS = "input_ids"
HEAD: Final = "head"
ATTENTION: Final = "attention"
EMBEDDING: Final = "embedding"
_PARTS: Final = (HEAD, ATTENTION, EMBEDDING)
"""Options that choose the scheme of a part of the model."""

QUANTIZED: Final = {"linear": (1,), "moe": (3, 4), "embedding": (0,)}
"""Ops that have a form over codes, and which of their operands are matrices."""
_CODED: Final = {
    "scaled_linear": (2,),
    "decoded_linear": (1,),
    "scaled_moe": (3, 5),
    "scaled_embedding": (0,),
}
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
    auto_head: str = ""
    attention: str = ""
    embedding: str = AUTO

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Patterns and schemes, first those that are skipped; UsageError for an unknown scheme."""
        pairs = [(pattern, NONE) for pattern in self.skip.split()] + _parse_rules(self.rules)
        known = (NONE, *ADOPTING, *SCHEMES)
        for name in (*self.named(), *(scheme for _, scheme in pairs)):
            if name not in known:
                raise UsageError(f"unknown scheme {name}", where=self.name, hint=", ".join(known))
        return tuple((pattern.removeprefix("@"), scheme) for pattern, scheme in pairs)

    def named(self) -> set[str]:
        """Every scheme that an option names."""
        rules = (scheme for _, scheme in _parse_rules(self.rules))
        given = {self.scheme, self.head, self.auto_head, self.attention, self.embedding, *rules}
        return {NONE if name in ("", AUTO) else name for name in given}

    @property
    def is_used(self) -> bool:
        """Whether any option says something of a matrix."""
        chosen = (self.scheme, self.head, self.attention, self.embedding)
        return bool(self.pairs()) or is_quantizing(*chosen)


def _parse_rules(text: str) -> list[tuple[str, str]]:
    """Patterns and schemes of `pattern=scheme`, separated by spaces."""
    return [(pattern, scheme) for pattern, _, scheme in (x.rpartition("=") for x in text.split())]


class _Parts:
    """Which options of parts of the model chose a scheme, and which of them rules took all from.

    An option that nobody has set has no use to lose.
    """

    def __init__(self, options: SchemePass) -> None:
        given = {HEAD: options.head, ATTENTION: options.attention, EMBEDDING: options.embedding}
        self.set = {part: name for part, name in given.items() if name not in ("", AUTO)}
        self.used: set[str] = set()
        self.lost: dict[str, str] = {}

    def note(self, part: str, name: str, rule: tuple[str, str] | None) -> None:
        """Take in a matrix of a part, and the rule that chose its scheme."""
        if rule is None:
            self.used.add(part)
        else:
            self.lost.setdefault(part, f"{name} matches {rule[0]}")

    def unused(self, first: int, where: str) -> dict[int, UnusedPattern]:
        """The options that chose nothing, at places from `first` on."""
        return {
            place: UnusedPattern(
                UsageError(
                    f"{part}: {self.set[part]} has no effect: {self.lost[part]}",
                    where=where,
                    hint=f"rules and skip go before {part}: remove one of both",
                ),
                is_lost=True,
            )
            for place, part in enumerate(_PARTS, first)
            if part in self.set and part in self.lost and part not in self.used
        }


class SchemeChoices:
    """Which scheme each matrix gets, or why it stays as it is.

    `options` are those of the pass; `pick` has the last word on a scheme that was chosen. `used`
    has the indices of rules that decided about a matrix, and `lost` those that matched one without
    deciding, with a reason.
    """

    def __init__(self, program: Program, options: SchemePass, pick: Pick) -> None:
        self.program = program
        self.scheme = options.scheme
        self.rules = options.pairs()
        self.num_skipped = len(options.skip.split())
        self.head = options.head
        if self.head == AUTO:
            self.head = options.auto_head or eight_bits(self.scheme)
        self.attention = options.attention
        self.embedding = options.embedding
        self.parts = _Parts(options)
        self.pick = pick
        self.where = options.name
        self.used: set[int] = set()
        self.lost: dict[int, str] = {}
        self.routers = routers(program)
        logits = program.output(LOGITS)
        self.heads = nearest_products(program, [logits] if logits is not None else [])
        self.around_attention = attention_products(program)
        self.of_tokens = {_TOKENS, *depends_only_on(program, [_TOKENS])}
        self.products: dict[str, Node] = {}
        for node in program.nodes:
            if node.op == "linear" and isinstance(ref := node.inputs[1], WeightRef):
                self.products.setdefault(self._matrix(ref), node)
        is_open = self.attention == AUTO and has_four_bits(self.scheme)
        self.sensitive = self._sensitive() if is_open else set()

    def choose(self, node: Node) -> Scheme | str | None:
        """The scheme of a matrix, or why it stays as it is; None for an op that reads none."""
        for place in _CODED.get(node.op, ()):  # a rule for what is in codes already has its use
            name = str(node.inputs[place]).removeprefix("@").removesuffix(".codes")
            rule = self._rule(name, id(node) in self.heads)
            for part in self._parts_of(node):
                self.parts.note(part, name, rule)
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

    def _sensitive(self) -> set[int]:
        """The ids of the products that have 8 bits beside others of 4, unless a rule says more.

        Those of keys, values and results of attention, which are small for what they contribute to
        the error. What 4 bits save in a table of its own, in which errors count for little, is
        spent on queries, and then on what follows activation functions.
        """
        program = self.program
        queries = query_products(program)
        found = self.around_attention - queries
        left = self._spared_elements()
        for group in (queries, feed_forward_products(program)):
            size = sum(self._elements(x) for x in program.nodes if id(x) in group)
            if size <= left:
                found, left = found | group, left - size
        return found

    def _spared_elements(self) -> int:
        """Elements of tables that have 4 bits by default."""
        if self.embedding != AUTO:
            return 0
        tables = [
            node
            for node in self.program.nodes
            if node.op == "embedding"
            and isinstance(ref := node.inputs[0], WeightRef)
            and getattr(node.inputs[1], "name", None) in self.of_tokens
            and self._product(ref) is None
        ]
        return sum(map(self._elements, tables))

    def _elements(self, node: Node) -> int:
        """How many weights the matrix of a node has; none where it has none."""
        refs = [node.inputs[place] for place in QUANTIZED.get(node.op, ())]
        weights = [self.program.weights[ref.name] for ref in refs if isinstance(ref, WeightRef)]
        return sum(weight.type.num_elements() for weight in weights)

    def _choose_table(self, node: Node) -> Scheme | str | None:
        """As `choose`; None as well for a table that was computed when compiling."""
        ref = node.inputs[0]
        if not isinstance(ref, WeightRef) or not _is_stored(self.program.weights[ref.name].expr):
            return None
        rule = self._rule(ref.name, is_head=False)
        if getattr(node.inputs[1], "name", None) in self.of_tokens:
            self.parts.note(EMBEDDING, ref.name, rule)
        # An error of a row that is looked up is one of many terms that follow, unlike one of the
        # head: with 4 bits, Qwen2.5-Coder-0.5B is 1 % further from its source.
        keeps = self.scheme in ADOPTING or has_few_bits(self.scheme) or is_fp8(self.scheme)
        scheme, reason = self.scheme if keeps else INT8.name, ""
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
        refs = [node.inputs[place] for place in QUANTIZED[node.op]]
        if id(node) in self.routers:
            return self._router(refs)
        found = [self._scheme(ref, node) for ref in refs]
        (scheme, reason), *others = found
        if any(other != scheme for other, _ in others):
            given = " and ".join(f"{a} is {b}" for a, (b, _) in zip(refs, found, strict=True))
            raise UsageError(
                f"{given}, but the matrices of a mixture of experts must have the same scheme",
                where=self.where,
                hint="write a rule that matches both",
            )
        return reason if scheme == NONE else self._picked(node, scheme, refs)

    def _picked(self, node: Node, scheme: str, matrices: Sequence[Operand]) -> Scheme | str:
        chosen = self.pick(node, scheme, matrices)
        obstacles = (self._obstacle(ref, chosen) for ref in matrices)
        return next(filter(None, obstacles), chosen)

    def _scheme(self, ref: Operand, node: Node) -> tuple[str, str]:
        """The scheme of a matrix of a product, and what to say if it is none."""
        is_head = id(node) in self.heads
        rule = self._rule(ref.name, is_head) if isinstance(ref, WeightRef) else None
        for part in self._parts_of(node):
            self.parts.note(part, str(ref).removeprefix("@"), rule)
        if rule is not None:
            return rule[1], f"it matches {rule[0]}, which is left out"
        if is_head and self.head:
            return self.head, "it is the head, which is left out"
        if id(node) in self.sensitive:
            return eight_bits(self.scheme), ""
        if self.attention not in ("", AUTO) and id(node) in self.around_attention:
            return self.attention, "it is part of the attention, which is left out"
        return self.scheme, "the scheme is none"

    def _parts_of(self, node: Node) -> Iterator[str]:
        """The options that choose the scheme of a node's matrix unless a rule does."""
        if node.op == "scaled_embedding":
            yield EMBEDDING
        if id(node) in self.heads:
            yield HEAD
        elif id(node) in self.around_attention:
            yield ATTENTION

    def _router(self, refs: Sequence[Operand]) -> str:
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
        names = [name, name.removesuffix(".weight")]
        names += ["lm_head", "lm_head.weight"] if is_head else []
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

    def _obstacle(self, ref: Operand, chosen: Scheme | str) -> str | None:
        if not isinstance(ref, WeightRef):
            return "its matrix is computed"
        kind = self.program.weights[ref.name].type
        if not kind.dtype.is_float:
            return "its matrix is quantized already"
        depth = kind.shape[-1]
        if not isinstance(depth, int):
            return "its rows have no fixed length"
        if isinstance(chosen, Scheme) and chosen.is_exact and depth > MAX_EXACT_DEPTH:
            return f"its rows of {depth} are longer than int32 sums hold"
        return None

    def unused(self) -> dict[int, UnusedPattern]:
        """What decided about no matrix, and what is wrong with it.

        Patterns by their places, and behind them the options of parts of the model.
        """
        found = self.parts.unused(len(self.rules), self.where)
        for place, (pattern, _) in enumerate(self.rules):
            if place in self.used:
                continue
            what = "skip" if place < self.num_skipped else "rules"
            if place in self.lost:
                message = f"{what}: {pattern} has no effect: {self.lost[place]}"
                hint: str | None = (
                    "the first pattern that matches a name is used, those of skip before"
                    " rules: put it first, or remove it"
                )
            else:
                names = self._names()
                message = f"{what}: no matrix is named {pattern}"
                hint = f"names look like {', '.join(names[:3])}" if names else None
            error = UsageError(message, where=self.where, hint=hint)
            found[place] = UnusedPattern(error, place in self.lost)
        return found

    def require_all_used(self) -> None:
        """UsageError for what decided about no matrix of this program."""
        for one in self.unused().values():
            raise one.error

    def _names(self) -> list[str]:
        """The names of matrices that a rule could quantize, in program order."""
        refs = [
            node.inputs[place]
            for node in self.program.nodes
            if node.op != "embedding" and id(node) not in self.routers
            for place in QUANTIZED.get(node.op, ())
        ]
        return [
            ref.name
            for ref in refs
            if isinstance(ref, WeightRef) and self._obstacle(ref, INT8) is None
        ]


def stored_formats(exprs: Iterable[WeightExpr]) -> set[str]:
    """The formats of few bits in which a file holds what these expressions read."""
    found = (leaf.attrs.get("stored") for expr in exprs for leaf in leaves(expr))
    return {str(one) for one in found if one is not None}


def matrix_exprs(program: Program, matrices: Sequence[Operand]) -> list[WeightExpr]:
    """The expressions of operands that are entries of the weight table."""
    return [program.weights[ref.name].expr for ref in matrices if isinstance(ref, WeightRef)]


def _is_stored(expr: WeightExpr) -> bool:
    return any(leaf.op == "checkpoint" for leaf in leaves(expr))
