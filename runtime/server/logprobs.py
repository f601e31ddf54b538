"""Log-probabilities in the two shapes of OpenAI's API, and the text of single tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..outputs import TokenLogprobs
from ..text_decoders import token_bytes

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

_LOWEST = -9999.0  # JSON has no -Infinity; the number that OpenAI's API gives in its place
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenTexts:
    """The text and the bytes of one token, whole characters or not."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._byte_level = tokenizer is not None and _is_byte_level(tokenizer)
        self.describe = lru_cache(maxsize=4096)(self._describe)
        """`describe(token_id)` is (text, bytes); a part of a character reads `bytes:\\xe2`."""

    def _describe(self, token_id: int) -> tuple[str, bytes | None]:
        token = self._tokenizer.backend.id_to_token(token_id) if self._tokenizer else None
        if token is None:
            return f"token_id:{token_id}", None
        data = self._bytes(token, token_id)
        try:
            return data.decode(), data
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data

    def _bytes(self, token: str, token_id: int) -> bytes:
        assert self._tokenizer is not None
        if token_id in self._tokenizer.special_ids:
            return token.encode()
        if self._byte_level:
            return token_bytes(token)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace("\u2581", " ").encode()


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    from tokenizers import decoders

    return isinstance(tokenizer.backend.decoder, decoders.ByteLevel)


def chat_logprobs(
    entries: Sequence[TokenLogprobs], texts: TokenTexts, num_top: int
) -> dict[str, Any]:
    """`choices[].logprobs` of a chat: one object a token."""
    return {"content": [_with_top(e, texts, num_top) for e in entries], "refusal": None}


def prompt_logprobs(
    entries: Sequence[TokenLogprobs | None], texts: TokenTexts, num_top: int
) -> list[dict[str, Any] | None]:
    """`choices[].prompt_logprobs`: one object a token of the prompt, null for the first."""
    return [None if entry is None else _with_top(entry, texts, num_top) for entry in entries]


def _with_top(entry: TokenLogprobs, texts: TokenTexts, num_top: int) -> dict[str, Any]:
    top = [_chat_entry(token, logprob, texts) for token, logprob in entry.top[:num_top]]
    return {**_chat_entry(entry.token_id, entry.logprob, texts), "top_logprobs": top}


def _chat_entry(token_id: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    text, data = texts.describe(token_id)
    return {
        "token": text,
        "logprob": max(logprob, _LOWEST),
        "bytes": None if data is None else list(data),
    }


def completion_logprobs(
    entries: Sequence[TokenLogprobs], texts: TokenTexts, num_top: int, offset: int
) -> dict[str, list[Any]]:
    """`choices[].logprobs` of a completion: parallel lists.

    `offset` is the number of characters that the tokens before these have; the next offset is
    `text_offset[-1] + len(tokens[-1])`.
    """
    tokens = [texts.describe(entry.token_id)[0] for entry in entries]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [max(entry.logprob, _LOWEST) for entry in entries],
        # The chosen token is among them even where it is not one of the likeliest.
        "top_logprobs": [
            {
                texts.describe(token_id)[0]: max(logprob, _LOWEST)
                for token_id, logprob in (*entry.top[:num_top], (entry.token_id, entry.logprob))
            }
            for entry in entries
        ],
        "text_offset": offsets,
    }


def echoed_logprobs(
    token_ids: Sequence[int],
    entries: Sequence[TokenLogprobs | None],
    texts: TokenTexts,
    num_top: int,
) -> dict[str, list[Any]]:
    """As `completion_logprobs`, for a prompt: nothing predicts its first token."""
    first = texts.describe(token_ids[0])[0]
    known = [entry for entry in entries if entry is not None]
    rest = completion_logprobs(known, texts, num_top, len(first))
    begin = {"tokens": first, "token_logprobs": None, "top_logprobs": None, "text_offset": 0}
    return {name: [begin[name], *values] for name, values in rest.items()}
