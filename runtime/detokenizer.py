"""Tokens to text as they come: whole characters only, and nothing that may be a stop string."""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import tokenizers

_REPLACEMENT = "\ufffd"
_MAX_HELD_TOKENS = 6  # a character has at most 4 bytes; more that make none are just not UTF-8


class TextDecoder(Protocol):
    """Turns tokens into text one by one."""

    def push(self, token_id: int) -> str:
        """The text that is certain now that `token_id` has come."""
        ...

    def flush(self) -> str:
        """What is left at the end: an unfinished character becomes U+FFFD."""
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


class ByteLevelDecoder:
    """For byte-level vocabularies: every token is bytes, joined as UTF-8. Equal to whole decode."""

    def __init__(self, texts: TokenTexts, special_ids: frozenset[int]) -> None:
        self._texts = texts
        self._special_ids = special_ids
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._between = True  # no character has been begun

    def push(self, token_id: int) -> str:
        """The characters that end within this token."""
        if token_id in self._special_ids:
            return ""
        known = self._texts.get(token_id)
        if self._between and isinstance(known, str):
            return known
        text = self._utf8.decode(known.encode() if isinstance(known, str) else known)
        self._between = not self._utf8.getstate()[0]
        return text

    def flush(self) -> str:
        """U+FFFD for a character that was begun, or nothing."""
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """For any other decoder: decodes a short window twice, and gives the difference.

    The window starts where the last text ended, so its cost doesn't grow. The tokens before it
    (`context`, the end of the prompt, at first) stay in it for the decoders that treat the first
    token of a text differently.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        skip_special_tokens: bool,
        context: Sequence[int] = (),
    ) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._known = list(context[-_MAX_HELD_TOKENS:])
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        """The text of the held tokens, once they end in a whole character."""
        self._held.append(token_id)
        text = self._difference()
        unfinished = not text or text.endswith(_REPLACEMENT)
        return "" if unfinished and len(self._held) < _MAX_HELD_TOKENS else self._take(text)

    def flush(self) -> str:
        """The text of what is held, unfinished or not."""
        return self._take(self._difference())

    def _difference(self) -> str:
        before = self._decode(self._known)
        return self._decode(self._known + self._held)[len(before) :]

    def _take(self, text: str) -> str:
        self._known, self._held = self._held, []
        return text

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._backend.decode(token_ids, skip_special_tokens=self._skip_special_tokens)
        return text


class StopMatcher:
    """Cuts a stream of text at the first stop string, wherever its pieces begin and end.

    The stop string that is complete first wins, and of those complete at once the longest, so
    the result does not depend on how the text was split.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(sorted(stops, key=len, reverse=True))
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that can no longer become part of a stop string."""
        if not self._stops:
            return text
        known = len(self._held)
        self._held += text
        end = self._first_end(known)
        if end is not None:
            result, self._held = self._held[: end - len(self.matched or "")], ""
            return result
        keep = self._longest_prefix()
        cut = len(self._held) - keep
        result, self._held = self._held[:cut], self._held[cut:]
        return result

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        result, self._held = self._held, ""
        return result

    def _first_end(self, known: int) -> int | None:
        """Where the first complete stop string ends; sets `matched`."""
        best: int | None = None
        for stop in self._stops:
            found = self._held.find(stop, max(0, known - len(stop) + 1))
            end = found + len(stop)
            if found >= 0 and (best is None or end < best):
                best, self.matched = end, stop
        return best

    def _longest_prefix(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(len(self._held), len(self._stops[0]) - 1)
        for length in range(longest, 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


class Detokenizer:
    """The text of one request. `matched_stop` is the stop string that ended it, if one did.

    The text of the first `min_tokens` tokens is never part of a stop string.
    """

    def __init__(
        self, decoder: TextDecoder, stops: Sequence[str] = (), min_tokens: int = 0
    ) -> None:
        self._decoder = decoder
        self._stops = StopMatcher(stops)
        self._num_free = min_tokens

    @property
    def matched_stop(self) -> str | None:
        """The stop string that was found; nothing may be pushed after it."""
        return self._stops.matched

    def push(self, token_id: int) -> str:
        """The text that is certain now."""
        text = self._decoder.push(token_id)
        if self._num_free > 0:
            self._num_free -= 1
            return text
        return self._stops.push(text)

    def flush(self) -> str:
        """The rest at the end of the request, unless a stop string ended it."""
        if self._stops.matched is not None:
            return ""
        text = self._stops.push(self._decoder.flush())
        return text if self._stops.matched is not None else text + self._stops.flush()


def open_decoder(
    backend: tokenizers.Tokenizer,
    special_ids: frozenset[int],
    *,
    skip_special_tokens: bool,
    context: Sequence[int] = (),
    texts: TokenTexts | None = None,
) -> TextDecoder:
    """The decoder that suits the vocabulary; `context` is the prompt, or its end.

    Those that share `texts` look up a token once.
    """
    from tokenizers import decoders

    if isinstance(backend.decoder, decoders.ByteLevel):
        special = special_ids if skip_special_tokens else frozenset()
        return ByteLevelDecoder(texts or TokenTexts(backend), special)
    return WindowDecoder(backend, skip_special_tokens, context)


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
