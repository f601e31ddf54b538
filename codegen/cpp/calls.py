"""Calls: the straight line of C++ statements that a program becomes, as data."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.types import Dim, Sym


def c_dim(dim: Dim) -> str:
    """A dimension as a C++ expression over the step's sizes."""
    if isinstance(dim, Sym):
        text = dim.name if dim.scale == 1 else f"({dim.scale} * {dim.name})"
        return text if dim.offset == 0 else f"({text} + {dim.offset})"
    return str(dim)


@dataclass(frozen=True, slots=True)
class Const:
    """An integer that may differ between equal layers, and then stands in the table."""

    value: int


@dataclass(frozen=True, slots=True)
class ArenaPtr:
    """An address in the arena: `byte_offset` from its start."""

    ctype: str
    byte_offset: int


@dataclass(frozen=True, slots=True)
class WeightPtr:
    """An address in a weight: entry `index` of the table of pointers, plus `byte_offset`."""

    ctype: str
    index: int
    byte_offset: int = 0


@dataclass(frozen=True, slots=True)
class InputPtr:
    """An array of the step, by the name it has in the generated function."""

    ctype: str
    name: str
    element_offset: str = "0"


Arg = Const | ArenaPtr | WeightPtr | InputPtr | str
"""A piece of a statement; text is the same in every layer."""

Code = tuple[Arg, ...]
"""A statement or a part of one: its pieces in the order in which they are written."""


def listed(*items: Arg | Code | int, separator: str = ", ") -> Code:
    """The items with a separator between them; an `int` is text."""
    pieces: list[Arg] = []
    for place, item in enumerate(items):
        pieces += [separator] if place else []
        if isinstance(item, tuple):
            pieces += item
        else:
            pieces.append(str(item) if isinstance(item, int) else item)
    return tuple(pieces)


def applied(function: str, *args: Arg | Code | int) -> Code:
    """`function(args)`."""
    return (f"{function}(", *listed(*args), ")")


def braced(kind: str, *fields: Arg | Code | int) -> Code:
    """`kind{fields}`: a value of the type, or with no name of it a list."""
    return (f"{kind}{{", *listed(*fields), "}")


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes that a call touches: a range of the arena, or all of a named state."""

    space: str
    start: int = 0
    stop: int = 1

    def overlaps(self, other: Span) -> bool:
        """True where both touch a byte in common."""
        return self.space == other.space and self.start < other.stop and other.start < self.stop


@dataclass(frozen=True, slots=True)
class Panels:
    """The matrix `[outputs, depth]` of elements of `ctype` that a product reads."""

    ctype: str
    weight: WeightPtr
    outputs: int
    depth: int


@dataclass(frozen=True, slots=True)
class Call:
    """One statement, and what it touches.

    Every thread of the team runs it on its own share; `comment` says what it is, and `nodes` are
    the labels of what it computes. Where `rows` is given, all spans consist of so many rows of
    equal size, one behind the other, and each thread touches its `share_of` them alone. `panels`
    are what it reads of a matrix, where it is a product by one.
    """

    code: Code
    reads: tuple[Span, ...]
    writes: tuple[Span, ...]
    comment: str = ""
    nodes: tuple[str, ...] = ()
    rows: str = ""
    panels: Panels | None = None

    def key(self) -> tuple[tuple[str, ...], ...]:
        """What must be equal for two calls to share one line in a loop over layers."""
        return tuple(_shape(arg) for arg in self.code)


def _shape(arg: Arg) -> tuple[str, ...]:
    match arg:
        case Const():
            return ("const",)
        case ArenaPtr(ctype, _):
            return ("arena", ctype)
        case WeightPtr(ctype, _, _):
            return ("weight", ctype)
        case InputPtr(ctype, name, offset):
            return ("input", ctype, name, offset)
        case str():
            return ("text", arg)


BARRIER = Call(("t.barrier(ahead);",), (), ())


def place_barriers(calls: list[Call]) -> list[Call]:
    """Put a barrier before each call that touches what calls since the last barrier wrote.

    Also before one that writes what they read: threads do not run in step.
    """
    result: list[Call] = []
    since: list[Call] = []
    for call in calls:
        if any(conflicts(earlier, call) for earlier in since):
            result.append(BARRIER)
            since = []
        result.append(call)
        since.append(call)
    return result


def conflicts(earlier: Call, later: Call) -> bool:
    """Whether one thread may not begin `later` before all have done their share of `earlier`.

    Where both share out the same rows, a thread finds its own in what both touch alike.
    """
    pairs = [(a, b) for a in earlier.writes for b in (*later.reads, *later.writes)]
    pairs += [(a, b) for a in earlier.reads for b in later.writes]
    alike = bool(earlier.rows) and earlier.rows == later.rows
    return any(a.overlaps(b) and not (alike and a == b) for a, b in pairs)


def read_ahead(calls: list[Call]) -> list[Call]:
    """Say at the start and behind each product which panels come next: barriers ask for them.

    Behind the last come those of the first: another step will follow.
    """
    products = [call.panels for call in calls if call.panels is not None]
    if not products:
        return calls
    coming = iter([*products[1:], products[0]])
    result = [_announce(products[0])]
    for call in calls:
        result.append(call)
        if call.panels is not None:
            result.append(_announce(next(coming)))
    return result


def _announce(panels: Panels) -> Call:
    # Of T rows, also where the product has R: a step in which these differ has too many to gain.
    # So that the last layer, before the head, is written like the others.
    shape = Const(panels.outputs), Const(panels.depth)
    found = applied(f"panels_ahead<{panels.ctype}>", "t", panels.weight, "T", *shape)
    return Call(("ahead = ", *found, ";"), (), ())
