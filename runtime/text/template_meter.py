"""What rendering a chat template may cost: each step of it is paid for before it is made."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, MappingView
from dataclasses import dataclass
from typing import Any, Final

PIECE: Final = 64
"""What an object costs beside its characters, in characters."""

_TICKS_A_LOOK: Final = 64  # steps between two looks at the clock
_LARGE: Final = 1 << 14  # characters that are worth one
_MAX_BITS: Final = 1 << 12


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderLimits:
    """What one rendering may take.

    `seconds` are the thread's own, so that a busy machine changes nothing. `characters` count
    whatever is made on the way, also what is thrown away again, and `per_character` more for each
    that goes in: real templates copy a message some ten times.
    """

    seconds: float = 2.0
    characters: int = 1 << 24
    per_character: int = 32


class TooMuch(Exception):
    """The template does more than it may."""


class Unwritable:
    """What holds values, and is not to be written out, compared or hashed with them."""


_HOLDERS: Final = (list, tuple, set, frozenset, Mapping, MappingView, Unwritable)


class _Meter:
    __slots__ = ("_deadline", "_left", "_ticks")

    def __init__(self, limits: RenderLimits, num_characters: int) -> None:
        self._deadline = time.thread_time() + limits.seconds
        self._left = limits.characters + limits.per_character * num_characters
        self._ticks = 0

    def take(self, characters: int) -> None:
        self._left -= characters
        if self._left < 0:
            raise TooMuch("it makes too much text of them")
        self.tick(_TICKS_A_LOOK if characters >= _LARGE else 1)

    def tick(self, steps: int) -> None:
        self._ticks += steps
        if self._ticks >= _TICKS_A_LOOK:
            self._ticks = 0
            if time.thread_time() > self._deadline:
                raise TooMuch("it takes too long over them")


class _Running(threading.local):
    meter: _Meter | None = None


_running = _Running()


@contextlib.contextmanager
def metered(limits: RenderLimits, num_characters: int = 0) -> Iterator[None]:
    """Bounds what this thread renders meanwhile: TooMuch is raised from within."""
    before, _running.meter = _running.meter, _Meter(limits, num_characters)
    try:
        yield
    finally:
        _running.meter = before


def take(characters: int) -> None:
    """Pay for so many characters, before they are made."""
    if (meter := _running.meter) is not None:
        meter.take(characters)


def tick(steps: int = 1) -> None:
    """Pay for steps that make no text."""
    if (meter := _running.meter) is not None:
        meter.tick(steps)


def counted(values: Iterable[Any]) -> Iterator[Any]:
    """The values, each of which costs a step."""
    for value in values:
        tick()
        yield value


def weigh(value: Any) -> tuple[int, int]:
    """Pay for writing out, comparing or hashing a value; its parts and its depth.

    Lists that hold lists twice are small to have and large to walk, so this comes first.
    """
    if not isinstance(value, _HOLDERS):
        return 1, 0
    stack, num_parts, deepest = [(value, 1)], 0, 0
    while stack:
        one, depth = stack.pop()
        num_parts += 1
        if isinstance(one, str):
            take(2 * len(one))
            continue
        deepest = max(deepest, depth)
        if isinstance(one, Unwritable):
            raise TooMuch("it writes out a namespace")
        if isinstance(one, _HOLDERS):
            take(PIECE * len(one))
            parts: Any = one
            if isinstance(one, Mapping):
                parts = (part for pair in one.items() for part in pair)
            stack += ((part, depth + 1) for part in parts)
    return num_parts, deepest


def check_number(value: Any) -> None:
    """Refuses a whole number that takes long to reckon with."""
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise TooMuch("it reckons with too large a number")
