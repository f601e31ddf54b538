"""A user's own rewrite: a pattern and a replacement as two plain functions over `ops`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

from ..ir.errors import UsageError
from ..ir.ops import get_op
from ..ir.program import Attr, Operand, Program, Value, WeightRef
from ..ir.types import DType, TensorType
from .base import CONTRACTS, PIPELINE_PHASES, Pass, PassContext, PassResult, finish
from .match import Emitter, Match, OpPattern, Pattern, PatternLike, Rule, Var, rewrite_all

_EMITTER: ContextVar[Emitter | None] = ContextVar("emitter", default=None)


@dataclass(frozen=True, slots=True)
class Handle:
    """An operand while a replacement is traced; arithmetic on it adds nodes."""

    operand: Operand
    kind: TensorType | int | float | bool

    @property
    def type(self) -> TensorType:
        """Its tensor type; UsageError for a literal."""
        if not isinstance(self.kind, TensorType):
            raise UsageError(f"the literal {self.kind} has no tensor type")
        return self.kind

    @property
    def shape(self) -> tuple[Any, ...]:
        """Its dimensions: sizes and symbols."""
        return self.type.shape

    @property
    def dtype(self) -> DType:
        """Its element type."""
        return self.type.dtype

    @property
    def is_weight(self) -> bool:
        """Whether it is a weight of the model."""
        return isinstance(self.operand, WeightRef)

    def __add__(self, other: object) -> Handle:
        return _emit("add", (self, other), {})

    def __radd__(self, other: object) -> Handle:
        return _emit("add", (other, self), {})

    def __mul__(self, other: object) -> Handle:
        return _emit("mul", (self, other), {})

    def __rmul__(self, other: object) -> Handle:
        return _emit("mul", (other, self), {})

    def __sub__(self, other: object) -> Handle:
        return _emit("sub", (self, other), {})

    def __rsub__(self, other: object) -> Handle:
        return _emit("sub", (other, self), {})

    def __truediv__(self, other: object) -> Handle:
        return _emit("div", (self, other), {})

    def __rtruediv__(self, other: object) -> Handle:
        return _emit("div", (other, self), {})

    def __pow__(self, other: object) -> Handle:
        return _emit("pow", (self, other), {})

    def __neg__(self) -> Handle:
        return _emit("neg", (self,), {})


class _Ops:
    """The dialect as functions: in a pattern they describe nodes, in a replacement they add them.

    `ops.softmax(x, dim=-1)`: operands by position, attributes by name.
    """

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        get_op(name)  # an unknown op is named here, with the nearest one

        def call(*operands: Any, **attrs: Any) -> Any:
            if _EMITTER.get() is not None:
                return _emit(name, operands, attrs)
            return OpPattern(name, operands, attrs)

        return call


ops = _Ops()


def _emit(op: str, operands: tuple[Any, ...], attrs: dict[str, Any]) -> Handle:
    emitter = _EMITTER.get()
    if emitter is None:
        raise UsageError(f"{op} is called on a value outside a replacement")
    plain = [o.operand if isinstance(o, Handle) else o for o in operands]
    value = emitter(op, *plain, **attrs)
    return Handle(value, value.type)


@dataclass(frozen=True)
class RewritePass(Pass):
    """What `rewrite` makes: one rule, applied wherever it matches."""

    rule: ClassVar[Rule]

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Apply the rule until nothing matches."""
        swept = rewrite_all(program, [self.rule])
        return finish(program, swept.program, swept.matches, swept.near_misses)


def rewrite(
    name: str,
    pattern: Callable[..., Any],
    replacement: Callable[..., Any],
    *,
    when: Callable[..., bool] | None = None,
    contract: str = "exact",
    phase: str = "fuse",
    requires: tuple[str, ...] = (),
    tolerance: float = 0.05,
    doc: str = "",
) -> type[Pass]:
    """A pass that replaces every occurrence of a pattern; usable as `my_module:MyPass`.

    `pattern` and `replacement` are functions of the same parameters, written with `ops` and
    arithmetic. A parameter captures an operand, or an attribute where it stands as a keyword
    (`ops.rms_norm(x, w, eps=eps)`). `when`, of the same parameters, may decline a match.
    `contract` is what is verified: "exact", "reassociates", or "lossy" within `tolerance`.
    Raises UsageError for a pattern that is not an op, or parameters that differ.
    """
    if contract not in CONTRACTS:
        raise UsageError(f"contract {contract!r}", where=name, hint=f"one of {list(CONTRACTS)}")
    if phase not in PIPELINE_PHASES:
        raise UsageError(f"phase {phase!r}", where=name, hint=f"one of {list(PIPELINE_PHASES)}")
    names = tuple(inspect.signature(pattern).parameters)
    for function in (replacement, *([when] if when else [])):
        given = tuple(inspect.signature(function).parameters)
        if given != names:
            raise UsageError(
                f"{function.__name__} takes ({', '.join(given)}), the pattern ({', '.join(names)})",
                where=name,
            )
    traced = pattern(*(Var(parameter) for parameter in names))
    if not isinstance(traced, OpPattern):
        raise UsageError("the pattern must return an op's result", where=name)
    _check_pattern(name, traced, names)
    rule = Rule(traced, _replacer(names, replacement), _condition(name, names, when))
    body = {
        "__doc__": doc or inspect.getdoc(pattern) or f"Replaces what `{name}` matches.",
        "__module__": pattern.__module__,
        "name": name,
        "phase": phase,
        "contract": contract,
        "requires": frozenset(requires),
        "tolerance": tolerance,
        "rule": rule,
    }
    title = "".join(part.capitalize() for part in name.split("-"))
    return dataclass(frozen=True)(type(title, (RewritePass,), body))


def _check_pattern(name: str, pattern: PatternLike, names: tuple[str, ...]) -> None:
    """UsageError for a parameter that the pattern never mentions, or a wrong operand count."""
    mentioned: set[str] = set()

    def visit(part: object) -> None:
        if isinstance(part, Var):
            mentioned.add(part.name)
        elif isinstance(part, OpPattern):
            op = get_op(part.op)
            inputs = part.inputs or ()
            if not op.accepts_count(len(inputs)):
                raise UsageError(f"{part.op} takes ({', '.join(op.operands)})", where=name)
            for attr in part.attrs:
                if attr not in op.attr_specs:
                    raise UsageError(f"{part.op} has no attribute {attr}", where=name)
            for inner in (*inputs, *part.attrs.values()):
                visit(inner)
        elif isinstance(part, Pattern):
            inner_parts = getattr(part, "choices", None) or (getattr(part, "inner", None),)
            for inner in inner_parts:
                visit(inner)

    visit(pattern)
    missing = [parameter for parameter in names if parameter not in mentioned]
    if missing:
        raise UsageError(f"the pattern never uses its parameter {missing[0]}", where=name)


def _handles(match: Match, names: tuple[str, ...], type_of: Callable[[Operand], Any]) -> list[Any]:
    """The captures as a user's function takes them: operands as handles, attributes plain."""
    result: list[Any] = []
    for name in names:
        found: Attr | Operand = match.captures.get(name)
        is_operand = isinstance(found, (Value, WeightRef))
        result.append(Handle(found, type_of(found)) if is_operand else found)  # type: ignore[arg-type]
    return result


def _replacer(
    names: tuple[str, ...], replacement: Callable[..., Any]
) -> Callable[[Emitter, Match], Operand | None]:
    def replace(emit: Emitter, match: Match) -> Operand | None:
        token = _EMITTER.set(emit)
        try:
            result = replacement(*_handles(match, names, emit.type_of))
        finally:
            _EMITTER.reset(token)
        return result.operand if isinstance(result, Handle) else result

    return replace


def _condition(
    name: str, names: tuple[str, ...], when: Callable[..., bool] | None
) -> Callable[[Program, Match], str | None] | None:
    if when is None:
        return None

    def condition(program: Program, match: Match) -> str | None:
        allowed = when(*_handles(match, names, program.operand_type))
        return None if allowed else f"the condition of {name} does not hold"

    return condition
