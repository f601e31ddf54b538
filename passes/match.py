"""Patterns as data, the matcher, and the one walker that rewrites a program by them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..ir.builder import ProgramBuilder, remove_dead_code
from ..ir.interpret import describe
from ..ir.ops import get_op
from ..ir.ops.base import REQUIRED
from ..ir.program import Attr, Node, Operand, Program, Value, WeightRef

COMMUTATIVE = frozenset(
    {"add", "mul", "maximum", "minimum", "eq", "ne", "logical_and", "logical_or"}
)
"""Ops whose two operands may stand in either order."""


class Pattern:
    """Anything that matches an operand; arithmetic on patterns makes bigger ones."""

    __slots__ = ()

    def __add__(self, other: PatternLike) -> OpPattern:
        return OpPattern("add", (self, other))

    def __radd__(self, other: PatternLike) -> OpPattern:
        return OpPattern("add", (other, self))

    def __mul__(self, other: PatternLike) -> OpPattern:
        return OpPattern("mul", (self, other))

    def __rmul__(self, other: PatternLike) -> OpPattern:
        return OpPattern("mul", (other, self))

    def __sub__(self, other: PatternLike) -> OpPattern:
        return OpPattern("sub", (self, other))

    def __rsub__(self, other: PatternLike) -> OpPattern:
        return OpPattern("sub", (other, self))

    def __truediv__(self, other: PatternLike) -> OpPattern:
        return OpPattern("div", (self, other))

    def __rtruediv__(self, other: PatternLike) -> OpPattern:
        return OpPattern("div", (other, self))

    def __pow__(self, other: PatternLike) -> OpPattern:
        return OpPattern("pow", (self, other))

    def __neg__(self) -> OpPattern:
        return OpPattern("neg", (self,))


@dataclass(frozen=True, slots=True)
class Var(Pattern):
    """Captures an operand or an attribute under a name; the same name must meet the same thing.

    `kind` limits operands: "any", "value", "weight" or "literal".
    """

    name: str
    kind: str = "any"


@dataclass(frozen=True, slots=True, eq=False)
class OpPattern(Pattern):
    """A node of that op. Where one object stands twice in a pattern it is one and the same value.

    Attributes that are not mentioned must have their default; those without one, or with none
    as their default, match anything.
    With `any_attrs` they may be whatever they are. A node inside a match may be read only within
    it, unless it is `shared`. Without `inputs` any operands will do.
    """

    op: str
    inputs: tuple[PatternLike, ...] | None
    attrs: Mapping[str, Attr | Var] = field(default_factory=dict)
    shared: bool = False
    any_attrs: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Maybe(Pattern):
    """The inner pattern, or a node of `op` (say a cast) around it."""

    op: str
    inner: PatternLike


@dataclass(frozen=True, slots=True, eq=False)
class AnyOf(Pattern):
    """The first of several patterns that matches."""

    choices: tuple[PatternLike, ...]


PatternLike = Pattern | int | float | bool
"""A pattern, or a literal that must be met as such."""


def shared(pattern: OpPattern) -> OpPattern:
    """The pattern, whose node may also be read outside the match (it then stays)."""
    return replace(pattern, shared=True)


def optional_cast(pattern: PatternLike) -> Maybe:
    """The pattern, with or without a cast around it."""
    return Maybe("cast", pattern)


@dataclass(frozen=True, slots=True)
class Match:
    """What a pattern met: captures by name, and the nodes that go away, the root first."""

    captures: Mapping[str, Any]
    nodes: tuple[Node, ...]

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

    def match(self, pattern: PatternLike, node: Node) -> Iterator[tuple[Match, str | None]]:
        """Every way `pattern` meets the node as its root, and what forbids it (None: nothing)."""
        if len(node.outputs) != 1:
            return
        start = _State({}, {}, ())
        for state in self._operand(pattern, node.output, start):
            if not state.nodes or state.nodes[0][0] is not node:
                continue
            owned = tuple(inner for inner, is_shared in state.nodes if not is_shared)
            match = Match(state.captures, owned)
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
            if known == operand:
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
        if not pattern.any_attrs:
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


def _equal_literal(wanted: object, found: object) -> bool:
    if isinstance(found, (Value, WeightRef)):
        return False
    return isinstance(wanted, bool) == isinstance(found, bool) and wanted == found


def _bind(var: Var, thing: Any, state: _State) -> _State | None:
    kinds: Mapping[str, tuple[type, ...]] = {
        "any": (object,),
        "value": (Value,),
        "weight": (WeightRef,),
        "literal": (bool, int, float),
    }
    if not isinstance(thing, kinds[var.kind]):
        return None
    if var.name in state.captures:
        return state if state.captures[var.name] == thing else None
    return replace(state, captures={**state.captures, var.name: thing})


def _match_attrs(pattern: OpPattern, node: Node, state: _State) -> _State | None:
    current: _State | None = state
    for name, spec in get_op(node.op).attr_specs.items():
        actual = node.attrs.get(name)
        if name not in pattern.attrs:
            # None stands for "whatever follows from the operands" where an op fills it in.
            if spec.default in (None, REQUIRED) or actual == spec.default:
                continue
            return None
        wanted = pattern.attrs[name]
        if isinstance(wanted, Var):
            assert current is not None
            current = _bind(wanted, actual, current)
        elif not _same_attr(wanted, actual, name, node):
            current = None
        if current is None:
            return None
    return current


def _same_attr(wanted: Attr, actual: Attr, name: str, node: Node) -> bool:
    if wanted == actual:
        return True
    # Stored axes count from the front; a pattern may write them from the back.
    first = next((v for v in node.values()), None)
    rank = first.type.rank if first is not None else 0
    if name == "dim" and isinstance(wanted, int) and wanted < 0:
        return wanted + rank == actual
    if name == "dims" and isinstance(wanted, tuple):
        return tuple(d + rank if isinstance(d, int) and d < 0 else d for d in wanted) == actual
    return False


Replacement = Callable[["Emitter", Match], "Operand | None"]
"""Emits a match's replacement; None declines (the emitter's reason is a near miss)."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A pattern, what stands in its place, and a condition.

    The condition gives None to go ahead, or why not; an empty text declines without a near miss.
    """

    pattern: PatternLike
    replacement: Replacement
    when: Callable[[Program, Match], str | None] | None = None


class Emitter:
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

    def type_of(self, operand: Operand) -> Any:
        """The type of an operand; a literal is its own."""
        return self.builder.operand_type(operand)


@dataclass(slots=True)
class Sweep:
    """What a rewrite did: the program, how often rules matched, and what nearly did."""

    program: Program
    matches: int = 0
    near_misses: tuple[str, ...] = ()


MAX_SWEEPS = 64
"""A set of rules that still finds something after so many sweeps rewrites its own results."""


def rewrite_all(program: Program, rules: Sequence[Rule]) -> Sweep:
    """Apply rules wherever they match, sweep after sweep until none does; dead code goes.

    A replaced value keeps its name, so that dumps and verification can compare programs.
    """
    total = 0
    misses: dict[str, None] = {}
    for _ in range(MAX_SWEEPS):
        swept = sweep_once(program, rules)
        misses.update(dict.fromkeys(swept.near_misses))
        if swept.matches == 0:
            break
        total += swept.matches
        program = swept.program
    return Sweep(program, total, tuple(misses))


def sweep_once(program: Program, rules: Sequence[Rule]) -> Sweep:
    """Apply rules to matches that do not overlap, once through the program."""
    matcher = Matcher(program)
    by_op: dict[str, list[Rule]] = {}
    for rule in rules:
        for op in _root_ops(rule.pattern):
            by_op.setdefault(op, []).append(rule)
    builder = ProgramBuilder.from_program(program)
    claimed: set[int] = set()
    misses: list[str] = []
    count = 0
    for node in program.nodes:
        done = False
        for rule in by_op.get(node.op, ()):
            match, reason = _first(matcher, rule, node, claimed)
            if reason:
                misses.append(f"{describe(node)}: {reason}")
            if match is not None and _apply(program, builder, rule, match, misses):
                claimed.update(id(inner) for inner in match.nodes)
                count += 1
                done = True
                break
        if not done:
            builder.copy(node)
    if count == 0:
        return Sweep(program, 0, tuple(misses))
    return Sweep(remove_dead_code(builder.build()), count, tuple(misses))


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


def _apply(
    program: Program, builder: ProgramBuilder, rule: Rule, match: Match, misses: list[str]
) -> bool:
    mark = len(builder.nodes)
    old = match.root.output
    result = rule.replacement(Emitter(program, builder, match.root), match)
    if result is None:
        del builder.nodes[mark:]
        return False
    kind = builder.operand_type(result)
    if isinstance(result, Value) and kind != old.type:
        del builder.nodes[mark:]
        misses.append(f"{describe(match.root)}: its replacement would be {kind}, not {old.type}")
        return False
    adopt_name(builder, mark, old, result)
    return True


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
