"""The matcher, and the one walker that rewrites a program by patterns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ..ir.builder import ProgramBuilder, remove_dead_code
from ..ir.ops import get_op
from ..ir.ops.base import REQUIRED
from ..ir.program import Attr, Node, Operand, Program, Value, WeightRef, exact_key
from .constants import computed_weight
from .near_miss import NearMiss
from .patterns import AnyOf, Maybe, OpPattern, Pattern, PatternLike, Var, optional_cast, shared

__all__ = [
    "AnyOf",
    "Match",
    "Matcher",
    "Maybe",
    "NodeEmitter",
    "OpPattern",
    "Pattern",
    "PatternLike",
    "Rule",
    "Sweep",
    "Var",
    "adopt_name",
    "optional_cast",
    "rewrite_all",
    "shared",
    "sweep_once",
]

COMMUTATIVE = frozenset(
    {"add", "mul", "maximum", "minimum", "eq", "ne", "logical_and", "logical_or"}
)
"""Ops whose two operands may stand in either order."""


@dataclass(frozen=True, slots=True)
class Match:
    """What a pattern met: captures by name, and the nodes that go away, the root first.

    `producers` say which node made a value of the program.
    """

    captures: Mapping[str, Any]
    nodes: tuple[Node, ...]
    producers: Mapping[str, Node] = field(default_factory=dict, repr=False)

    @property
    def root(self) -> Node:
        """The node whose result is replaced."""
        return self.nodes[0]

    def operand(self, name: str) -> Operand:
        """A captured operand."""
        found = self.captures[name]
        assert isinstance(found, (Value, WeightRef, int, float))
        return found

    def value(self, name: str) -> Value:
        """A captured SSA value."""
        found = self.captures[name]
        assert isinstance(found, Value)
        return found


@dataclass(frozen=True, slots=True)
class _State:
    """Captures, the operand each pattern object met, and the nodes so far."""

    captures: Mapping[str, Any]
    met: Mapping[int, Operand]
    nodes: tuple[tuple[Node, bool], ...]


class Matcher:
    """Matches patterns against one program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.producers = program.producers()
        self.consumers = program.consumers()
        self.outputs = {value.name for value in program.outputs}

    @cached_property
    def heights(self) -> Mapping[str, int]:
        """How far each value is from the inputs, by the longest way."""
        heights = {value.name: 0 for value in self.program.inputs}
        for node in self.program.nodes:
            height = _height(node, heights)
            heights.update((value.name, height) for value in node.outputs)
        return heights

    def match(self, pattern: PatternLike, node: Node) -> Iterator[tuple[Match, str | None]]:
        """Every way `pattern` meets the node as its root, and what forbids it (None: nothing)."""
        if len(node.outputs) != 1:
            return
        start = _State({}, {}, ())
        for state in self._operand(pattern, node.output, start):
            if not state.nodes or state.nodes[0][0] is not node:
                continue
            owned = tuple(inner for inner, is_shared in state.nodes if not is_shared)
            match = Match(state.captures, owned, self.producers)
            yield match, self._leak(state)

    def _leak(self, state: _State) -> str | None:
        """Why the inner nodes cannot go away: one of them is read outside the match."""
        inside = {id(node) for node, _ in state.nodes}
        for node, is_shared in state.nodes[1:]:
            if is_shared:
                continue
            for value in node.outputs:
                users = self.consumers.get(value.name, [])
                if value.name in self.outputs or any(id(user) not in inside for user in users):
                    return f"{value} is also read elsewhere"
        return None

    def _operand(self, pattern: PatternLike, operand: Operand, state: _State) -> Iterator[_State]:
        if not isinstance(pattern, Pattern):
            if _equal_literal(pattern, operand):
                yield state
            return
        if isinstance(pattern, Var):
            bound = _bind(pattern, operand, state)
            if bound is not None:
                yield bound
            return
        known = state.met.get(id(pattern))
        if known is not None:
            if exact_key(known) == exact_key(operand):
                yield state
            return
        for found in self._compound(pattern, operand, state):
            yield replace(found, met={**found.met, id(pattern): operand})

    def _compound(self, pattern: Pattern, operand: Operand, state: _State) -> Iterator[_State]:
        if isinstance(pattern, AnyOf):
            for choice in pattern.choices:
                yield from self._operand(choice, operand, state)
        elif isinstance(pattern, Maybe):
            wrapped = OpPattern(pattern.op, (pattern.inner,), any_attrs=True)
            yield from self._node(wrapped, operand, state)
            yield from self._operand(pattern.inner, operand, state)
        elif isinstance(pattern, OpPattern):
            yield from self._node(pattern, operand, state)

    def _node(self, pattern: OpPattern, operand: Operand, state: _State) -> Iterator[_State]:
        if not isinstance(operand, Value):
            return
        node = self.producers.get(operand.name)
        if node is None or node.op != pattern.op or len(node.outputs) != 1:
            return
        if pattern.inputs is not None and len(node.inputs) != len(pattern.inputs):
            return
        with_attrs = _match_attrs(pattern, node, state)
        if with_attrs is None:
            return
        state = with_attrs
        state = replace(state, nodes=(*state.nodes, (node, pattern.shared)))
        if pattern.inputs is None:
            yield state
            return
        orders = [node.inputs]
        if node.op in COMMUTATIVE and node.inputs[0] != node.inputs[1]:
            orders.append(node.inputs[::-1])
        for order in orders:
            yield from self._inputs(pattern.inputs, order, state)

    def _inputs(
        self, patterns: Sequence[PatternLike], operands: Sequence[Operand], state: _State
    ) -> Iterator[_State]:
        if not patterns:
            yield state
            return
        for found in self._operand(patterns[0], operands[0], state):
            yield from self._inputs(patterns[1:], operands[1:], found)


def _equal_literal(wanted: Attr, found: Attr | Operand) -> bool:
    """Whether a pattern's constant met its like: 2 meets 2.0, but not True, nor 0.0 the -0.0."""
    if isinstance(found, (Value, WeightRef)):
        return False
    if isinstance(wanted, tuple) and isinstance(found, tuple):
        same = len(wanted) == len(found)
        return same and all(map(_equal_literal, wanted, found))
    if isinstance(wanted, bool) or isinstance(found, bool):
        return wanted is found
    if wanted == 0 and found == 0:
        return math.copysign(1, wanted) == math.copysign(1, found)
    return wanted == found or (wanted != wanted and found != found)


def _bind(var: Var, thing: Any, state: _State) -> _State | None:
    kinds: Mapping[str, tuple[type, ...]] = {
        "any": (object,),
        "value": (Value,),
        "weight": (WeightRef,),
        "literal": (bool, int, float),
    }
    if var.name in state.captures:
        return state if exact_key(state.captures[var.name]) == exact_key(thing) else None
    if not isinstance(thing, kinds[var.kind]):
        return None
    return replace(state, captures={**state.captures, var.name: thing})


def _match_attrs(pattern: OpPattern, node: Node, state: _State) -> _State | None:
    current: _State | None = state
    for name, spec in get_op(node.op).attr_specs.items():
        actual = node.attrs.get(name)
        if name not in pattern.attrs:
            if pattern.any_attrs:
                continue
            # None stands for "whatever follows from the operands" where an op fills it in.
            if spec.default is None or spec.default is REQUIRED:
                continue
            if _equal_literal(spec.default, actual):
                continue
            return None
        wanted = pattern.attrs[name]
        if wanted is ...:
            continue
        if isinstance(wanted, Var):
            assert current is not None
            current = _bind(wanted, actual, current)
        elif not _same_attr(wanted, actual, name, node):
            current = None
        if current is None:
            return None
    return current


def _same_attr(wanted: Attr, actual: Attr, name: str, node: Node) -> bool:
    if _equal_literal(wanted, actual):
        return True
    # Stored axes count from the front; a pattern may write them from the back.
    first = next((v for v in node.values()), None)
    rank = first.type.rank if first is not None else 0
    if name == "dim" and isinstance(wanted, int) and wanted < 0:
        return wanted + rank == actual
    if name == "dims" and isinstance(wanted, tuple):
        return tuple(d + rank if isinstance(d, int) and d < 0 else d for d in wanted) == actual
    return False


Replacement = Callable[["NodeEmitter", Match], "Operand | None"]
"""Emits a match's replacement; None declines (the emitter's reason is a near miss)."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A pattern, what stands in its place, and a condition.

    The condition gives None to go ahead, or why not; an empty text declines without a near miss.
    """

    pattern: PatternLike
    replacement: Replacement
    when: Callable[[Program, Match], str | None] | None = None


class NodeEmitter:
    """Adds the nodes of one replacement; names and layers follow those of the root.

    `program` is the one that the match was found in.
    """

    def __init__(self, program: Program, builder: ProgramBuilder, root: Node) -> None:
        self.program = program
        self.builder = builder
        self.root = root

    def __call__(self, op: str, *inputs: Operand, **attrs: Any) -> Value:
        """Add a node with one result; gives that value."""
        hint = f"{self.root.outputs[0].name}.{op}" if self.root.outputs else op
        node = self.builder.add(
            op, inputs, attrs, names=(hint,), layer=self.root.layer, source=self.root.source
        )
        return node.output

    def compute(self, op: str, *inputs: Operand, **attrs: Any) -> Operand:
        """The same, but what depends on weights alone is a weight, computed when compiling."""
        folded = computed_weight(self.builder, op, inputs, attrs)
        return self(op, *inputs, **attrs) if folded is None else folded

    def type_of(self, operand: Operand) -> Any:
        """The type of an operand; a literal is its own."""
        return self.builder.operand_type(operand)


@dataclass(slots=True)
class Sweep:
    """What a rewrite did: the program, how often rules matched, and what nearly did."""

    program: Program
    matches: int = 0
    near_misses: tuple[NearMiss, ...] = ()


def rewrite_all(program: Program, rules: Sequence[Rule]) -> Sweep:
    """Apply rules wherever they match, sweep after sweep until none does; dead code goes.

    What a rule made is not matched by it again, unless that makes the program smaller: a rule
    whose replacement holds its own pattern is applied once to each place. That is why this ends:
    let the rank of a node be the number of rules that had no part in making it. An application
    replaces nodes by nodes of lower rank; or by fewer of no higher rank; or one by one of the same
    rank that stands nearer to the inputs (a view of a view, say, becomes a view).

    A replaced value keeps its name, so that dumps and verification can compare programs.
    """
    total = 0
    misses: dict[NearMiss, None] = {}
    makers: Makers = {}
    while True:
        swept = sweep_once(program, rules, makers)
        misses.update(dict.fromkeys(swept.near_misses))
        if swept.matches == 0:
            return Sweep(program, total, tuple(misses))
        total += swept.matches
        program = swept.program


Makers = dict[str, frozenset[int]]
"""By the name of a value: which rules had a part in making it, by their places in the list."""


def sweep_once(program: Program, rules: Sequence[Rule], makers: Makers | None = None) -> Sweep:
    """Apply rules to matches that do not overlap, once through the program.

    `makers` says what earlier sweeps made, and is brought up to date.
    """
    sweeper = _Sweeper(program, rules, {} if makers is None else makers)
    for node in program.nodes:
        if not sweeper.rewrite(node):
            sweeper.builder.copy(node)
    if sweeper.matches == 0:
        return Sweep(program, 0, tuple(sweeper.misses))
    result = remove_dead_code(sweeper.builder.build())
    return Sweep(result, sweeper.matches, tuple(sweeper.misses))


class _Sweeper:
    """One sweep: what it has built so far, and the nodes that matches have taken."""

    def __init__(self, program: Program, rules: Sequence[Rule], makers: Makers) -> None:
        self.program = program
        self.rules = rules
        self.makers = makers
        self.matcher = Matcher(program)
        self.builder = ProgramBuilder.from_program(program)
        self.by_op: dict[str, list[int]] = {}
        for place, rule in enumerate(rules):
            for op in _root_ops(rule.pattern):
                self.by_op.setdefault(op, []).append(place)
        self.claimed: set[int] = set()
        self.misses: list[NearMiss] = []
        self.matches = 0

    def rewrite(self, node: Node) -> bool:
        """Whether a rule replaced the node."""
        for place in self.by_op.get(node.op, ()):
            match, reason = _first(self.matcher, self.rules[place], node, self.claimed)
            if reason:
                self.misses.append(NearMiss.at(node, reason))
            if match is not None and self._apply(place, match):
                self.claimed.update(id(inner) for inner in match.nodes)
                self.matches += 1
                return True
        return False

    def _apply(self, place: int, match: Match) -> bool:
        """Whether the rule's replacement was put in the place of the match."""
        builder, mark = self.builder, len(self.builder.nodes)
        old = match.root.output
        result = self.rules[place].replacement(
            NodeEmitter(self.program, builder, match.root), match
        )
        if result is None:
            del builder.nodes[mark:]
            return False
        kind = builder.operand_type(result)
        if isinstance(result, (Value, WeightRef)) and kind != old.type:
            del builder.nodes[mark:]
            reason = f"its replacement would be {kind}, not {old.type}"
            self.misses.append(NearMiss.at(match.root, reason))
            return False
        made = builder.nodes[mark:]
        behind = [self.makers.get(v.name, _NONE) for node in match.nodes for v in node.outputs]
        if any(place in rules for rules in behind) and not self._shrinks(match, made):
            del builder.nodes[mark:]
            return False
        adopt_name(builder, mark, old, result)
        rules = frozenset({place}).union(*behind)
        for node in builder.nodes[mark:]:
            self.makers.update((value.name, rules) for value in node.outputs)
        return True

    def _shrinks(self, match: Match, made: Sequence[Node]) -> bool:
        """Whether fewer nodes come than go, or one that stands nearer to the inputs."""
        # A node inside the match stays where the replacement reads it.
        read = {value.name for node in made for value in node.values()}
        stays = any(v.name in read for node in match.nodes[1:] for v in node.outputs)
        gone = 1 if stays else len({id(node) for node in match.nodes})
        if len(made) != 1 or gone != 1:
            return len(made) < gone
        heights = self.matcher.heights
        return _height(made[0], heights) < _height(match.root, heights)


_NONE: frozenset[int] = frozenset()


def _height(node: Node, heights: Mapping[str, int]) -> int:
    """The longest way from an input to the node's results."""
    return 1 + max((heights[value.name] for value in node.values()), default=0)


def _first(
    matcher: Matcher, rule: Rule, node: Node, claimed: set[int]
) -> tuple[Match | None, str | None]:
    """The first allowed match, or None and what forbade the first one found."""
    reason: str | None = None
    for match, leak in matcher.match(rule.pattern, node):
        if any(id(inner) in claimed for inner in match.nodes):
            continue
        problem = leak
        if problem is None and rule.when is not None:
            problem = rule.when(matcher.program, match)
        if problem is None:
            return match, None
        reason = reason or problem
    return None, reason


def adopt_name(builder: ProgramBuilder, mark: int, old: Value, result: Operand) -> None:
    """Let `result` stand for `old`: under its very name where nodes since `mark` made it."""
    made = {value.name for node in builder.nodes[mark:] for value in node.outputs}
    if not isinstance(result, Value) or result.name not in made or result.type != old.type:
        builder.replace(old, result)
        return

    def renamed(operand: Operand) -> Operand:
        return old if operand == result else operand

    for i in range(mark, len(builder.nodes)):
        node = builder.nodes[i]
        outputs = tuple(old if value == result else value for value in node.outputs)
        inputs = tuple(renamed(operand) for operand in node.inputs)
        builder.nodes[i] = replace(node, inputs=inputs, outputs=outputs)


def _root_ops(pattern: PatternLike) -> set[str]:
    if isinstance(pattern, OpPattern):
        return {pattern.op}
    if isinstance(pattern, AnyOf):
        return {op for choice in pattern.choices for op in _root_ops(choice)}
    if isinstance(pattern, Maybe):
        return {pattern.op} | _root_ops(pattern.inner)
    return set()
