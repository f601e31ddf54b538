"""Rolling: equal layers become a loop over a table, so that code does not grow with depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .calls import ArenaPtr, Arg, Call, Const, WeightPtr

MIN_REPEATS = 2


@dataclass(frozen=True, slots=True)
class Loop:
    """`count` repetitions of a body; `rows[i]` holds repetition i's entries of the table.

    An argument of the body that varies is a `Column`; the others are as in the first repetition.
    `nodes[i]` are the labels of what call i of the body computes, in all repetitions.
    """

    body: tuple[Call, ...]
    columns: tuple[tuple[int, int], ...]
    rows: tuple[tuple[int, ...], ...]
    nodes: tuple[tuple[str, ...], ...]

    @property
    def count(self) -> int:
        """Number of repetitions."""
        return len(self.rows)


Item = Call | Loop


@dataclass(frozen=True, slots=True)
class _Run:
    start: int
    period: int
    repeats: int

    @property
    def saved(self) -> int:
        return self.period * (self.repeats - 1)


def roll(calls: Sequence[Call]) -> list[Item]:
    """Replace the most profitable repetition by a loop, then do the same before and after it."""
    run = _best_run([hash(call.key()) for call in calls])
    if run is None:
        return list(calls)
    stop = run.start + run.period * run.repeats
    before, after = roll(calls[: run.start]), roll(calls[stop:])
    return [*before, _loop(calls[run.start : stop], run.period), *after]


def _best_run(keys: list[int]) -> _Run | None:
    best: _Run | None = None
    for period in range(1, len(keys) // 2 + 1):
        for run in _runs(keys, period):
            if run.repeats >= MIN_REPEATS and (best is None or run.saved > best.saved):
                best = run
    # Rolling two statements into a loop makes nothing shorter.
    return best if best is not None and best.saved >= 4 else None


def _runs(keys: list[int], period: int) -> list[_Run]:
    runs = []
    start = 0
    for i in range(len(keys) - period + 1):
        matches = i + period < len(keys) and keys[i] == keys[i + period]
        if not matches:
            repeats = (i - start) // period + 1
            runs.append(_Run(start, period, repeats))
            start = i + 1
    return runs


def _loop(calls: Sequence[Call], period: int) -> Loop:
    body = tuple(calls[:period])
    repeats = [calls[i : i + period] for i in range(0, len(calls), period)]
    columns = []
    for index, call in enumerate(body):
        for place in range(len(call.code)):
            if len({repeat[index].code[place] for repeat in repeats}) > 1:
                columns.append((index, place))
    rows = tuple(
        tuple(_entry(repeat[index].code[place]) for index, place in columns) for repeat in repeats
    )
    nodes = tuple(
        tuple(label for call in same for label in call.nodes) for same in zip(*repeats, strict=True)
    )
    return Loop(body, tuple(columns), rows, nodes)


def _entry(arg: Arg) -> int:
    match arg:
        case Const(value):
            return value
        case ArenaPtr(_, byte_offset):
            return byte_offset
        case WeightPtr(_, index, byte_offset) if byte_offset < 1 << 40:
            return index << 40 | byte_offset
    raise AssertionError(f"{arg!r} cannot vary between layers")
