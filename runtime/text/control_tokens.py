"""Control tokens in what people write: read as text, for only the template speaks to the model."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from ...ir.errors import RequestError
from .encoding import encode_texts
from .template_text import FROM_TEMPLATE, origins_of, plain

if TYPE_CHECKING:
    import tokenizers

_Span = tuple[int, int]

_ANCHOR: Final = "\n"
"""Stands before a piece from the middle of a text: some tokenizers treat its beginning apart."""

_MAX_ROUNDS: Final = 64


class ControlTokens:
    """Tokenizes what a template rendered, so that control tokens come from the template alone.

    They are the special tokens, and the other added tokens that the template writes (`written`).
    The text is tokenized as a whole, as everybody does it; only where a control token comes out
    of characters that the template did not write is it cut there, and the pieces tokenized anew.
    """

    def __init__(self, backend: tokenizers.Tokenizer, written: str) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        control = {
            index: token
            for index, token in added.items()
            # Templates write white space as they write any text.
            if not token.content.isspace() and (token.special or token.content in written)
        }
        self._texts = {index: token.content for index, token in control.items()}
        words = sorted((t.content for t in control.values() if not t.single_word), key=len)
        pattern = "|".join(map(re.escape, reversed(words)))
        self._spelled = re.compile(pattern) if pattern else None
        self._stand_alone = _stand_alone(control.values(), added.values())
        self._anchor_ids: list[int] | None = None
        # What stands for characters that the vocabulary lacks says nothing unless it is spelled.
        self._unknown = frozenset(self._encode(["\U0010fffd"])[0].ids) & self._texts.keys()

    def encode(self, rendered: str) -> list[int]:
        """The tokens of a rendered conversation."""
        text = plain(rendered)
        own = _own(origins_of(rendered))
        expected = self._expected(text, own)
        if self._stand_alone:
            # Those of the template are all found, so as many as it wrote are no more than those.
            (encoding,) = encode_texts(self._backend, [text], field="messages")
            ids: list[int] = encoding.ids
            if sum(token in self._texts for token in ids) == len(expected):
                return ids
        work: list[_Span] = [(0, len(text))]
        done: list[tuple[int, list[int]]] = []
        for _ in range(_MAX_ROUNDS):
            again: list[_Span] = []
            for span, (ids, found) in zip(work, self._tokenize(text, work), strict=True):
                cuts = self._cuts(text, own, span, found, expected)
                if cuts:
                    again += itertools.pairwise([span[0], *sorted(cuts), span[1]])
                else:
                    done.append((span[0], ids))
            if not (work := again):
                return [token for _, ids in sorted(done) for token in ids]
        raise RequestError(
            "the messages contain control tokens within control tokens", field="messages"
        )

    def _expected(self, text: str, own: bytes) -> list[_Span]:
        """Where the template spelled a control token, which text beside it may not take from it."""
        if self._spelled is None:
            return []
        runs = re.finditer(rb"\x01+", own)
        matches = (
            match for run in runs for match in self._spelled.finditer(text, run.start(), run.end())
        )
        return [_trimmed(text, match.span()) for match in matches]

    def _cuts(
        self,
        text: str,
        own: bytes,
        span: _Span,
        found: list[tuple[int, _Span]],
        expected: list[_Span],
    ) -> set[int]:
        """Where a piece has to be cut; nowhere if its control tokens are the template's."""
        cuts: set[int] = set()
        kept = set()
        for token, (begin, end) in found:
            if b"\0" not in own[begin:end]:
                kept.add((begin, end))
                continue
            if token in self._unknown and self._texts[token] not in text[begin:end]:
                continue
            borders = [i for i in range(begin + 1, end) if own[i] != own[i - 1]]
            if not borders and end - begin > 1:
                borders = [begin + 1]
            if not borders and len(self._texts[token]) > 1:
                raise RequestError(
                    "a message contains a character that this tokenizer cannot distinguish from"
                    " a control token",
                    field="messages",
                )
            cuts.update(borders)
        first = bisect.bisect_left(expected, span[0], key=lambda one: one[0])
        last = bisect.bisect_right(expected, span[1], key=lambda one: one[1])
        for begin, end in expected[first:last]:
            if (begin, end) not in kept:
                cuts.update(
                    at
                    for at, outside in ((begin, begin - 1), (end, end))
                    if span[0] < at < span[1] and not own[outside]
                )
        return cuts

    def _tokenize(
        self, text: str, spans: list[_Span]
    ) -> list[tuple[list[int], list[tuple[int, _Span]]]]:
        """The tokens of each piece, and its control tokens with the characters they stand for."""
        anchors = [_ANCHOR if begin else "" for begin, _ in spans]
        pieces = [a + text[begin:end] for a, (begin, end) in zip(anchors, spans, strict=True)]
        result = []
        for (begin, end), anchor, encoding in zip(
            spans, anchors, self._encode(pieces), strict=True
        ):
            ids, skipped = encoding.ids, 0
            if anchor:
                skipped = len(self._ids_of_anchor())
                if ids[:skipped] != self._ids_of_anchor():
                    anchor, skipped = "", 0
                    (encoding,) = self._encode([text[begin:end]])
                    ids = encoding.ids
            shift = begin - len(anchor)
            found = []
            for index in range(skipped, len(ids)):
                if ids[index] in self._texts:
                    a, b = encoding.token_to_chars(index) or (0, 0)
                    found.append((ids[index], _trimmed(text, (a + shift, b + shift))))
            result.append((ids[skipped:], found))
        return result

    def _ids_of_anchor(self) -> list[int]:
        if self._anchor_ids is None:
            self._anchor_ids = self._encode([_ANCHOR])[0].ids
        return self._anchor_ids

    def _encode(self, pieces: list[str]) -> list[tokenizers.Encoding]:
        return encode_texts(self._backend, pieces, field="messages", offsets=True)


def _stand_alone(
    control: Iterable[tokenizers.AddedToken], added: Iterable[tokenizers.AddedToken]
) -> bool:
    """Whether control tokens are found wherever they are spelled, whatever stands beside them.

    Else another added token may begin before one of them, or end behind it.
    """
    words = {token.content for token in added}
    heads = {word[:end] for word in words for end in range(1, len(word))}
    tails = {word[end:] for word in words for end in range(1, len(word))}
    for token in control:
        word = token.content
        if token.normalized or token.single_word:
            return False
        if any(word[at:] in heads or word[:at] in tails for at in range(1, len(word))):
            return False
        if any(word in other and word != other for other in words):
            return False
    return True


def _own(origins: bytes) -> bytes:
    """1 for each character that the template wrote, else 0."""
    return origins.translate(bytes(i & FROM_TEMPLATE for i in range(256)))


def _trimmed(text: str, span: _Span) -> _Span:
    """Without the blanks around it, which some control tokens swallow."""
    begin, end = span
    inner = text[begin:end].strip()
    if not inner:
        return span
    begin = text.index(inner, begin)
    return begin, begin + len(inner)
