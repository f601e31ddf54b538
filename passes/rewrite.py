"""A user's own rewrite: a pattern and a replacement as two plain functions over `ops`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from ..ir.errors import UsageError
from ..ir.ops import get_op
from ..ir.program import Operand, Program
from .base import CONTRACTS, PIPELINE_PHASES, Pass, PassContext, PassResult, finish
from .handles import Handle, emitting, handles, ops
from .match import Match, NodeEmitter, OpPattern, Pattern, PatternLike, Rule, Var, rewrite_all
from .user_code import defined_at

__all__ = ["Handle", "RewritePass", "ops", "rewrite"]

_OPTION_TYPES: Final[Mapping[type, str]] = {bool: "bool", int: "int", float: "float", str: "str"}


@dataclass(frozen=True)
class RewritePass(Pass):
    """What `rewrite` makes: one rule, applied wherever it matches."""

    pattern: ClassVar[PatternLike]
    parameters: ClassVar[tuple[str, ...]]
    replacement: ClassVar[Callable[..., Any]]
    when: ClassVar[Callable[..., bool] | None]
    place: ClassVar[str | None] = None

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Apply the rule until nothing of the program as it came matches."""
        swept = rewrite_all(program, [Rule(self.pattern, self._replace, self._condition)])
        return finish(program, swept.program, swept.matches, swept.near_misses)

    def _replace(self, emit: NodeEmitter, match: Match) -> Operand | None:
        function = type(self).replacement
        given = handles(match, self.parameters, emit.program)
        with emitting(emit):
            result = function(*given, **self._options_of(function))
        return result.operand if isinstance(result, Handle) else result

    def _condition(self, program: Program, match: Match) -> str | None:
        """None to go ahead; a condition that does not hold is no near miss, but what was meant."""
        function = type(self).when
        if function is None:
            return None
        given = handles(match, self.parameters, program)
        return None if function(*given, **self._options_of(function)) else ""

    def _options_of(self, function: Callable[..., Any]) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _options(function)}


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
    """Creates a pass that replaces every occurrence of a pattern; usable as `my_module:MyPass`.

    `pattern` and `replacement` are functions of the same parameters, written with `ops` and
    arithmetic. A parameter captures an operand, or an attribute if it is passed as a keyword
    (`ops.rms_norm(x, w, eps=eps)`). `when` has the same parameters and can reject a match.
    Keyword-only parameters of `replacement` and `when` are options of the pass. Each has a
    default value (a number, a string or a boolean), which a recipe can override.
    `contract` is verified: "exact", "reassociates", or "lossy" within `tolerance`.
    Raises UsageError if the pattern is not an op, or if the parameters differ.
    """
    if contract not in CONTRACTS:
        raise UsageError(
            f"unknown contract {contract!r}", where=name, hint=f"one of {list(CONTRACTS)}"
        )
    if phase not in PIPELINE_PHASES:
        raise UsageError(
            f"unknown phase {phase!r}", where=name, hint=f"one of {list(PIPELINE_PHASES)}"
        )
    names = _parameters(pattern)
    options: dict[str, Any] = {}
    for function in (replacement, *([when] if when else [])):
        given = _parameters(function)
        if given != names:
            raise UsageError(
                f"{function.__name__} takes ({', '.join(given)}), the pattern ({', '.join(names)})",
                where=name,
            )
        for option, default in _options(function).items():
            if options.setdefault(option, default) != default:
                raise UsageError(f"option {option} has two defaults", where=name)
    traced = pattern(*(Var(parameter) for parameter in names))
    if not isinstance(traced, OpPattern):
        raise UsageError("the pattern must return an op's result", where=name)
    _check_pattern(name, traced, names)
    body = {
        "__doc__": doc or inspect.getdoc(pattern) or f"Replaces what `{name}` matches.",
        "__module__": pattern.__module__,
        "__annotations__": {o: _option_type(name, o, value) for o, value in options.items()},
        **options,
        "name": name,
        "phase": phase,
        "contract": contract,
        "requires": frozenset(requires),
        "tolerance": tolerance,
        "pattern": traced,
        "parameters": names,
        "replacement": staticmethod(replacement),
        "when": None if when is None else staticmethod(when),
        "place": defined_at(replacement),
    }
    title = "".join(part.capitalize() for part in name.split("-"))
    return dataclass(frozen=True)(type(title, (RewritePass,), body))


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """The parameters that stand for what a pattern captures."""
    parameters = inspect.signature(function).parameters.values()
    return tuple(one.name for one in parameters if one.kind is not one.KEYWORD_ONLY)


def _options(function: Callable[..., Any]) -> dict[str, Any]:
    """The keyword-only parameters, with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    return {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}


def _option_type(name: str, option: str, default: Any) -> str:
    known = _OPTION_TYPES.get(type(default))
    if known is None:
        wanted = "a default: a number, text or true or false"
        raise UsageError(f"option {option} needs {wanted}", where=name)
    taken = {*Pass.__annotations__, *RewritePass.__annotations__, "after", "before"}
    if hasattr(RewritePass, option) or option in taken:
        raise UsageError(f"option {option} has a reserved name", where=name)
    return known


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
