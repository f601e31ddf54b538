"""Tokens to text one by one: together what the tokenizers library makes of all of them at once.

The text of an answer is what it adds to the whole characters of its prompt: where a prompt ends
inside a character, the answer that completes the character has all of it.
"""

from __future__ import annotations

import codecs
import contextlib
import copy
import json
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import tokenizers

REPLACEMENT = "\ufffd"
_WINDOW = 6  # tokens; a character has at most 4 bytes: more that make none are just not UTF-8
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TextDecoder(Protocol):
    """Turns the tokens of one answer into text."""

    def push(self, token_id: int) -> str:
        """The text that is certain now that `token_id` has come."""
        ...

    def flush(self) -> str:
        """What is left at the end: an unfinished character becomes U+FFFD."""
        ...

    def fork(self) -> TextDecoder:
        """Another in the same state, for another answer to the same prompt."""
        ...


class TokenTexts:
    """What each token of a byte-level vocabulary stands for, looked up once for all requests.

    Text where it is whole characters, as almost every token is; else bytes.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._known: dict[int, str | bytes] = {}

    def get(self, token_id: int) -> str | bytes:
        """Text or bytes; nothing for an id that is no token."""
        known = self._known.get(token_id)
        if known is None:
            token = self._backend.id_to_token(token_id)
            known = b"" if token is None else token_bytes(token)
            with contextlib.suppress(UnicodeDecodeError):
                known = known.decode()
            self._known[token_id] = known
        return known

    def open(self, skipped: frozenset[int], context: Sequence[int]) -> TextDecoder:
        """A decoder of what follows the tokens `context`."""
        return ByteLevelDecoder(self, skipped, context)


class ByteLevelDecoder:
    """For byte-level vocabularies: every token is bytes, joined as UTF-8. Equal to whole decode."""

    def __init__(
        self, texts: TokenTexts, skipped: frozenset[int], context: Sequence[int] = ()
    ) -> None:
        self._texts = texts
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._utf8.decode(_unfinished(self._last_bytes(context)))
        self._between = not self._utf8.getstate()[0]  # no character has been begun
        self._is_empty = True

    def push(self, token_id: int) -> str:
        """The characters that end within this token."""
        if token_id in self._skipped:
            return ""
        known = self._texts.get(token_id)
        if self._between and isinstance(known, str):
            return known
        text = self._utf8.decode(known.encode() if isinstance(known, str) else known)
        self._between = not self._utf8.getstate()[0]
        self._is_empty = self._is_empty and not known
        return text

    def flush(self) -> str:
        """U+FFFD for a character that was begun, or nothing."""
        text = self._utf8.decode(b"", final=True)
        return "" if self._is_empty else text  # the prompt's own is no text of the answer

    def fork(self) -> ByteLevelDecoder:
        """Another in the same state."""
        twin = copy.copy(self)
        twin._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        twin._utf8.setstate(self._utf8.getstate())
        return twin

    def _last_bytes(self, context: Sequence[int]) -> bytes:
        data = b""
        for token_id in reversed(context):
            if token_id not in self._skipped:
                known = self._texts.get(token_id)
                data = (known.encode() if isinstance(known, str) else known) + data
                if len(data) > 3:
                    break
        return data


class PieceTexts:
    """What each token of a vocabulary stands for whose decoder takes them one by one.

    Such decoders (`_takes_one_by_one`) make of a token the same text wherever it stands, but at
    the beginning of all: there a first token or first characters may lose a blank.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, stages: Sequence[dict[str, Any]], anchor: int
    ) -> None:
        self._backend = backend
        self._anchor = anchor
        self._num_anchor = len(self._decode([anchor]))
        self._known: dict[int, str | bytes | None] = {}
        kinds = [stage["type"] for stage in stages]
        self._has_bytes = "ByteFallback" in kinds
        self.stripped: tuple[str, int] = ("", 0)
        """The character that the whole text loses at its beginning, and how many times at most."""
        if kinds and kinds[-1] == "Strip":
            self.stripped = (stages[-1]["content"], stages[-1]["start"])
        self.first_differs = not kinds or kinds[0] in ("Metaspace", "WordPiece")

    def get(self, token_id: int) -> str | bytes | None:
        """Its text after others; a token that is a byte gives that; None for no token."""
        if token_id not in self._known:
            self._known[token_id] = self._look_up(token_id)
        return self._known[token_id]

    def first(self, token_id: int) -> str:
        """Its text where it is the first of all."""
        return self._decode([token_id])

    def open(self, skipped: frozenset[int], context: Sequence[int]) -> TextDecoder:
        """A decoder of what follows the tokens `context`."""
        return PieceDecoder(self, skipped, context)

    def _look_up(self, token_id: int) -> str | bytes | None:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return None
        if self._has_bytes and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return self._decode([self._anchor, token_id])[self._num_anchor :]

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=False)
        return text


class PieceDecoder:
    """For decoders that take tokens one by one. Equal to whole decode but for bytes in disorder.

    Bytes that make no character are a U+FFFD each. The library takes away also the characters
    that stand beside them, which have gone out by then.
    """

    def __init__(
        self, texts: PieceTexts, skipped: frozenset[int], context: Sequence[int] = ()
    ) -> None:
        self._texts = texts
        self._skipped = skipped
        self._is_first = texts.first_differs
        self._character, self._num_stripped = texts.stripped
        self._bytes = b""
        for token_id in context:
            self.push(token_id)
            if not self._is_first and not self._num_stripped:
                break
        self._bytes = _unfinished(self._last_bytes(context))
        self._is_empty = True

    def push(self, token_id: int) -> str:
        """The characters that end with this token."""
        if token_id in self._skipped:
            return ""
        known = self._texts.get(token_id)
        if known is None:
            return ""
        if isinstance(known, bytes):
            text = self._add(known)
        else:
            if self._is_first:
                known = self._texts.first(token_id)
            text = REPLACEMENT * len(self._bytes) + known if self._bytes else known
            self._bytes = b""
        self._is_first = self._is_empty = False
        return self._strip(text) if self._num_stripped else text

    def flush(self) -> str:
        """U+FFFD for each byte of a character that was begun, or nothing."""
        text = self._strip(REPLACEMENT * len(self._bytes))
        self._bytes = b""
        return "" if self._is_empty else text  # the prompt's own is no text of the answer

    def fork(self) -> PieceDecoder:
        """Another in the same state."""
        return copy.copy(self)

    def _add(self, byte: bytes) -> str:
        """The text that is certain with one more byte."""
        data = self._bytes + byte
        try:
            text = codecs.getincrementaldecoder("utf-8")().decode(data)
        except UnicodeDecodeError:
            lost = len(self._bytes)
            self._bytes = b""
            return REPLACEMENT * lost + self._add(byte) if lost else REPLACEMENT
        self._bytes = b"" if text else data
        return text

    def _strip(self, text: str) -> str:
        """The text without what the beginning of all loses."""
        while self._num_stripped and text:
            if text[0] != self._character:
                self._num_stripped = 0
                break
            text = text[1:]
            self._num_stripped -= 1
        return text

    def _last_bytes(self, context: Sequence[int]) -> bytes:
        data = b""
        for token_id in reversed(context):
            known = None if token_id in self._skipped else self._texts.get(token_id)
            if isinstance(known, str) or len(data) > 3:
                break
            data = (known or b"") + data
        return data


class WindowDecoder:
    """For any other decoder: decodes a short window twice, and gives the difference.

    The window starts a few tokens before the last text ended, so its cost doesn't grow. The
    tokens before it (the end of the prompt, at first) stay in it for the decoders that treat the
    first token of a text differently. Tokens that are left out never enter it: a window of them
    alone would make whatever follows the first.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, skipped: frozenset[int], context: Sequence[int] = ()
    ) -> None:
        self._backend = backend
        self._skipped = skipped
        self._known: list[int] = []
        for token_id in reversed(context):
            if not self._is_left_out(token_id):
                self._known.insert(0, token_id)
                if len(self._known) == _WINDOW:
                    break
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The text of the held tokens, once they end in a whole character."""
        if self._is_left_out(token_id):
            return ""
        self._held.append(token_id)
        text = self._difference()
        unfinished = not text or text.endswith(REPLACEMENT)
        return "" if unfinished and len(self._held) < _WINDOW else self._take(text)

    def flush(self) -> str:
        """The text of what is held, unfinished or not."""
        return self._take(self._difference()) if self._held else ""

    def fork(self) -> WindowDecoder:
        """Another in the same state."""
        twin = copy.copy(self)
        twin._known, twin._held = self._known.copy(), self._held.copy()
        return twin

    def _is_left_out(self, token_id: int) -> bool:
        return token_id in self._skipped or self._backend.id_to_token(token_id) is None

    def _difference(self) -> str:
        before, after = self._decode(self._known), self._decode(self._known + self._held)
        # More tokens may change the end of what was there: a character that is complete now.
        pairs = zip(before, after, strict=False)
        same = next((i for i, (old, new) in enumerate(pairs) if old != new), len(before))
        return after[same:]

    def _take(self, text: str) -> str:
        self._known, self._held = (self._known + self._held)[-_WINDOW:], []
        return text

    def _decode(self, token_ids: list[int]) -> str:
        if not token_ids:  # some decoders of the library panic
            return ""
        text: str = self._backend.decode(token_ids, skip_special_tokens=False)
        return text


class _AnyTexts:
    """Stands for a vocabulary of which nothing can be looked up token by token."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend

    def open(self, skipped: frozenset[int], context: Sequence[int]) -> TextDecoder:
        """A decoder of what follows the tokens `context`."""
        return WindowDecoder(self._backend, skipped, context)


class Texts(Protocol):
    """What is shared by all decoders of one vocabulary."""

    def open(self, skipped: frozenset[int], context: Sequence[int]) -> TextDecoder:
        """A decoder of what follows the tokens `context`; the tokens `skipped` are left out."""
        ...


def texts_of(backend: tokenizers.Tokenizer) -> Texts:
    """What suits the decoder of a vocabulary."""
    stages = decoder_stages(backend)
    if is_byte_level(stages):
        return TokenTexts(backend)
    if _takes_one_by_one(stages) and (anchor := _anchor(backend)) is not None:
        return PieceTexts(backend, stages, anchor)
    return _AnyTexts(backend)


def decoder_stages(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoder as tokenizer.json has it, its sequences laid flat; empty where there is none."""
    if backend.decoder is None:
        return []
    return list(laid_flat(json.loads(backend.decoder.__getstate__())))


def laid_flat(decoder: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """A decoder as tokenizer.json has it, without the sequences in it."""
    if decoder["type"] != "Sequence":
        yield decoder
        return
    for inner in decoder["decoders"]:
        yield from laid_flat(inner)


def is_byte_level(stages: Sequence[dict[str, Any]]) -> bool:
    """Whether every token is bytes, written as the characters that stand for them."""
    kinds = [stage["type"] for stage in stages]
    return "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Fuse"}


def _takes_one_by_one(stages: Sequence[dict[str, Any]]) -> bool:
    """Whether a token's text depends at most on whether it is the first: see `PieceTexts`.

    As SentencePiece (blanks replaced, bytes as a fallback, and the text's first blank gone, or
    Metaspace), as WordPiece, and where there is no decoder.
    """
    kinds = [stage["type"] for stage in stages]
    if kinds and kinds[-1] == "Strip":
        if stages[-1]["stop"] or "Fuse" not in kinds:
            return False
        kinds.pop()
    whole = "".join(f"{kind} " for kind in kinds)
    return bool(re.fullmatch(r"(Replace )*(ByteFallback )?(Fuse )?|(Metaspace |WordPiece )", whole))


def _anchor(backend: tokenizers.Tokenizer) -> int | None:
    """A token of plain text, to stand before others where they shall not be the first."""
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    for token_id in range(backend.get_vocab_size()):
        if token_id in special:
            continue
        token = backend.id_to_token(token_id)
        if token is not None and token.isalnum() and backend.decode([token_id]) == token:
            return token_id
    return None


def _unfinished(data: bytes) -> bytes:
    """The end of some bytes that begins a character and does not end it."""
    for count in range(1, min(3, len(data)) + 1):
        end = data[-count:]
        if end[0] >= 0xC0:
            with contextlib.suppress(UnicodeDecodeError):
                return b"" if codecs.getincrementaldecoder("utf-8")().decode(end) else end
            return b""
    return b""


@lru_cache(maxsize=1)
def _byte_of_character() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + index): byte for index, byte in enumerate(others)}


def token_bytes(token: str) -> bytes:
    """The bytes that a token of a byte-level vocabulary stands for."""
    table = _byte_of_character()
    try:
        return bytes([table[character] for character in token])
    except KeyError:  # an added token is written as it is
        return token.encode()


def byte_spelling(data: bytes) -> str:
    """How a byte-level vocabulary writes a token of these bytes."""
    characters = _character_of_byte()
    return "".join(characters[byte] for byte in data)


@lru_cache(maxsize=1)
def _character_of_byte() -> dict[int, str]:
    return {byte: character for character, byte in _byte_of_character().items()}
