"""The name that was probably meant, for the hint of an error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

_MOST_CHARACTERS: Final = 80
"""Of a word that may come from a request: the comparison takes the square of its length."""


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is spelt most like `word`; None if none is alike enough.

    `cutoff` (0 to 1) is how alike is enough: the ratio of Ratcliff and Metzener's matching
    (`difflib`). Only the first 80 characters of `word` are looked at.
    """
    close = difflib.get_close_matches(word[:_MOST_CHARACTERS], list(known), 1, cutoff)
    return close[0] if close else None


def did_you_mean(word: str, known: Iterable[str], otherwise: str | None = None) -> str | None:
    """The hint "did you mean 'name'?" with the nearest known name; `otherwise` without one."""
    near = nearest(word, known)
    return otherwise if near is None else f"did you mean {near!r}?"
