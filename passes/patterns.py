"""Patterns as data: what a rule looks for, written with arithmetic and ops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import EllipsisType

from ..ir.program import Attr


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
    With `any_attrs` they may be whatever they are; a mentioned one that is `...` may be anything. A
    node inside a match may be read only within
    it, unless it is `shared`. Without `inputs` any operands will do.
    """

    op: str
    inputs: tuple[PatternLike, ...] | None
    attrs: Mapping[str, Attr | Var | EllipsisType] = field(default_factory=dict)
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
