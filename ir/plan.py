"""What the plan phase leaves in a program's attributes, with types: loop groups, arena, graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ProgramError
from .program import Program


@dataclass(frozen=True, slots=True)
class Arena:
    """Scratch of one step at its greatest sizes: bytes in all, and where each value lies."""

    num_bytes: int
    offsets: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Graphs:
    """Which steps a device captures as graphs.

    `buckets` are the numbers of sequences for which steps of one query each are captured whole,
    `pieces` the numbers of tokens for which other steps are, in pieces between the nodes whose
    results are `cuts`. `inputs` are the arrays of a step whose addresses stay.
    """

    buckets: tuple[int, ...] = ()
    pieces: tuple[int, ...] = ()
    cuts: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()


def loop_groups(program: Program) -> tuple[tuple[str, ...], ...]:
    """The result names of each group of nodes that run as one loop, in program order."""
    groups = program.attrs.get("loops") or ()
    if not isinstance(groups, tuple):
        raise ProgramError("attr loops is a tuple of groups", where=program.name)
    return tuple(_names(group, program) for group in groups)


def _names(group: object, program: Program) -> tuple[str, ...]:
    if not isinstance(group, tuple) or not all(isinstance(name, str) for name in group):
        raise ProgramError("a group of attr loops is a tuple of names", where=program.name)
    return group


def planned_arena(program: Program) -> Arena:
    """The arena that `plan-memory` laid out; an empty one before it has run."""
    total = program.attrs.get("arena_bytes") or 0
    pairs = program.attrs.get("offsets") or ()
    if not isinstance(total, int) or not isinstance(pairs, tuple):
        raise ProgramError("attrs arena_bytes and offsets are not a plan", where=program.name)
    offsets: dict[str, int] = {}
    for pair in pairs:
        match pair:
            case (str(name), int(offset)):
                offsets[name] = offset
            case _:
                raise ProgramError(f"{pair!r} in attr offsets is not a place", where=program.name)
    return Arena(total, offsets)


def planned_graphs(program: Program) -> Graphs:
    """What `plan-graphs` chose; nothing is captured before it has run."""
    return Graphs(
        buckets=_sizes(program, "graph_buckets"),
        pieces=_sizes(program, "graph_pieces"),
        cuts=_texts(program, "graph_cuts"),
        inputs=_texts(program, "graph_inputs"),
    )


def _sizes(program: Program, name: str) -> tuple[int, ...]:
    value = program.attrs.get(name) or ()
    sizes = [size for size in value if type(size) is int] if isinstance(value, tuple) else []
    if not isinstance(value, tuple) or len(sizes) != len(value):
        raise ProgramError(f"attr {name} is not a tuple of sizes", where=program.name)
    if sizes != sorted(set(sizes)) or min(sizes, default=1) < 1:
        raise ProgramError(f"attr {name} does not ascend from 1", where=program.name)
    return tuple(sizes)


def _texts(program: Program, name: str) -> tuple[str, ...]:
    value = program.attrs.get(name) or ()
    texts = [text for text in value if isinstance(text, str)] if isinstance(value, tuple) else []
    if not isinstance(value, tuple) or len(texts) != len(value):
        raise ProgramError(f"attr {name} is not a tuple of names", where=program.name)
    return tuple(texts)
