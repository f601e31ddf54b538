"""Patterns of recipes that decide about matrices, and the errors of those that are of no use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..ir.errors import UsageError

if TYPE_CHECKING:
    from .base import Pass


@dataclass(frozen=True, slots=True)
class UnusedPattern:
    """The error of a pattern that decided about no matrix, and whether it matched one's name."""

    error: UsageError
    is_lost: bool


class PatternUses:
    """What patterns decide about in programs that are compiled together: in one of them is enough.

    Nothing is ignored silently: what is used in none is an error.
    """

    def __init__(self) -> None:
        self._unused: dict[Pass, dict[int, UnusedPattern]] = {}

    def add(self, of: Pass, unused: Mapping[int, UnusedPattern]) -> None:
        """Take in the patterns that a pass had no use for in one program, by their places."""
        before = self._unused.get(of)
        if before is None:
            self._unused[of] = dict(unused)
            return
        both = sorted(before.keys() & unused.keys())
        self._unused[of] = {
            place: unused[place] if unused[place].is_lost else before[place] for place in both
        }

    def require_all_used(self) -> None:
        """UsageError for a pattern that was used in no program."""
        for unused in self._unused.values():
            for one in unused.values():
                raise one.error
