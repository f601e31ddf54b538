"""Control tokens in what people write: read as text, for only the template speaks to the model."""

from __future__ import annotations

import itertools
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..ir.errors import RequestError

# Characters that no text may hold (Unicode calls them noncharacters), drawn anew by each process:
# nobody can write this on purpose.
_CUT = "".join(chr(0xFDD0 + secrets.randbelow(32)) for _ in range(12))
_CUTS = re.compile(f"{_CUT}|{re.escape(json.dumps(_CUT)[1:-1])}")  # as a template's tojson has it

_OF_THE_TEMPLATE = frozenset({"role", "type"})
"""Keys of a message, or of a part of one, whose values are words of the format."""


class ControlTokens:
    """Cuts apart the spellings of control tokens in messages, so that they tokenize as text.

    A message goes through the chat template as it is, but for an invisible mark inside each
    spelling; `pieces` cuts the rendered text at the marks. No piece holds a control token that the
    template did not write, and together they are what the template wrote.
    """

    def __init__(
        self, spellings: Iterable[str], normalize: Callable[[str], str] | None = None
    ) -> None:
        words = sorted((word for word in spellings if len(word) > 1), key=len, reverse=True)
        self._normalize = normalize  # where control tokens are looked for after it
        # Every place where one begins, also inside another.
        self._begins = re.compile(f"(?={'|'.join(map(re.escape, words))})") if words else None
        # Half of one, that what stands beside the message may make whole.
        self._heads = tuple({word[:end] for word in words for end in range(2, len(word))})
        self._tails = tuple({word[end:] for word in words for end in range(1, len(word) - 1)})

    def mark(self, messages: Sequence[Any]) -> list[Any]:
        """The messages with marks in whatever text they hold; others are left as they are."""
        if self._begins is None:
            return list(messages)
        return [self._marked(message) for message in messages]

    @staticmethod
    def pieces(rendered: str) -> list[str]:
        """What a template made of marked messages, cut at the marks; at least one piece."""
        first, *rest = _CUTS.split(rendered)
        return [first, *(piece for piece in rest if piece)]

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._marked_text(value)
        if isinstance(value, Mapping):
            return {k: v if k in _OF_THE_TEMPLATE else self._marked(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._marked(item) for item in value]
        return value

    def _marked_text(self, text: str) -> str:
        assert self._begins is not None
        if self._normalize is not None and not self._begins.search(text):
            self._check_normalized(text)
        places = {match.start() + 1 for match in self._begins.finditer(text)}
        # Templates may trim, so the ends are those of what is not blank.
        inner = text.strip()
        begin = text.find(inner) if inner else 0
        if inner.startswith(self._tails):
            places.add(begin)
        if inner.endswith(self._heads):
            places.add(begin + len(inner))
        if not places:
            return text
        cuts = [0, *sorted(places), len(text)]
        return _CUT.join(text[a:b] for a, b in itertools.pairwise(cuts))

    def _check_normalized(self, text: str) -> None:
        assert self._begins is not None and self._normalize is not None
        if self._begins.search(self._normalize(text)):
            raise RequestError(
                "a message spells a control token in other characters, which this tokenizer"
                " cannot tell from the real one",
                field="messages",
            )
