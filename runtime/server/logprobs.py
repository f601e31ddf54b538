"""Log-probabilities in the two shapes of OpenAI's API, and the text of single tokens."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from ..sampling.token_logprobs import TokenLogprobs
from ..text.text_decoders import byte_spelling, decoder_stages, is_byte_level, token_bytes

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

_LOWEST = -9999.0  # JSON has no -Infinity; the number that OpenAI's API gives in its place
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenNames:
    """What single tokens are called, and their bytes, whole characters or not.

    A name is no text of an answer: special tokens have one, and no two tokens have the same.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        stages = decoder_stages(tokenizer.backend) if tokenizer is not None else []
        self._byte_level = is_byte_level(stages)
        self.describe = lru_cache(maxsize=4096)(self._describe)
        """`describe(token_id)` is (name, bytes): its text, where that is whole characters and no
        other token's; else `bytes:\\xe2`; else `token_id:7`. Special tokens have no bytes, as an
        answer has none of them."""

    def _describe(self, token_id: int) -> tuple[str, bytes | None]:
        names = []
        data = self._bytes(token_id)
        if data is not None:
            with contextlib.suppress(UnicodeDecodeError):
                names.append(data.decode())
            names.append("bytes:" + "".join(f"\\x{byte:02x}" for byte in data))
            names = names[self._place(token_id, data) :]
        if self.tokenizer is not None and token_id in self.tokenizer.special_ids:
            data = None
        return names[0] if names else f"token_id:{token_id}", data

    def _place(self, token_id: int, data: bytes) -> int:
        """How many tokens have the text before this one: byte tokens come last."""
        assert self.tokenizer is not None
        text = data.decode(errors="replace")
        spellings = [text, text.replace(" ", "\u2581"), byte_spelling(data)]
        spellings += [f"<0x{data[0]:02X}>"] if len(data) == 1 else []
        found = dict.fromkeys(map(self.tokenizer.backend.token_to_id, spellings))
        equal = [i for i in found if i is not None and self._bytes(i) == data]
        return equal.index(token_id) if token_id in equal else len(equal)

    def _bytes(self, token_id: int) -> bytes | None:
        token = self.tokenizer.backend.id_to_token(token_id) if self.tokenizer else None
        if token is None or self.tokenizer is None:
            return None
        if token_id in self.tokenizer.special_ids:
            return token.encode()
        if self._byte_level:
            return token_bytes(token)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace("\u2581", " ").encode()


def chat_logprobs(
    entries: Sequence[TokenLogprobs], texts: TokenNames, num_top: int
) -> dict[str, Any]:
    """`choices[].logprobs` of a chat: one object a token."""
    return {"content": [_with_top(e, texts, num_top) for e in entries], "refusal": None}


def prompt_logprobs(
    entries: Sequence[TokenLogprobs | None], texts: TokenNames, num_top: int
) -> list[dict[str, Any] | None]:
    """`choices[].prompt_logprobs`: one object a token of the prompt, null for the first."""
    return [None if entry is None else _with_top(entry, texts, num_top) for entry in entries]


def _with_top(entry: TokenLogprobs, texts: TokenNames, num_top: int) -> dict[str, Any]:
    top = [_chat_entry(token, logprob, texts) for token, logprob in entry.top[:num_top]]
    return {**_chat_entry(entry.token_id, entry.logprob, texts), "top_logprobs": top}


def _chat_entry(token_id: int, logprob: float, texts: TokenNames) -> dict[str, Any]:
    text, data = texts.describe(token_id)
    return {
        "token": text,
        "logprob": max(logprob, _LOWEST),
        "bytes": None if data is None else list(data),
    }


def completion_logprobs(
    entries: Sequence[TokenLogprobs], offsets: Sequence[int], texts: TokenNames, num_top: int
) -> dict[str, list[Any]]:
    """`choices[].logprobs` of a completion: parallel lists.

    `offsets` say where in the text of the choice each token begins.
    """
    return {
        "tokens": [texts.describe(entry.token_id)[0] for entry in entries],
        "token_logprobs": [max(entry.logprob, _LOWEST) for entry in entries],
        # The chosen token is among them even where it is not one of the likeliest.
        "top_logprobs": [
            {
                texts.describe(token_id)[0]: max(logprob, _LOWEST)
                for token_id, logprob in (*entry.top[:num_top], (entry.token_id, entry.logprob))
            }
            for entry in entries
        ],
        "text_offset": list(offsets),
    }


def echoed_logprobs(
    token_ids: Sequence[int],
    entries: Sequence[TokenLogprobs | None],
    text: str,
    texts: TokenNames,
    num_top: int,
) -> dict[str, list[Any]]:
    """As `completion_logprobs`, for a prompt and its text: nothing predicts its first token."""
    first = texts.describe(token_ids[0])[0]
    known = [entry for entry in entries if entry is not None]
    offsets = _prompt_offsets(token_ids, text, texts.tokenizer)
    rest = completion_logprobs(known, offsets[1:], texts, num_top)
    begin = {"tokens": first, "token_logprobs": None, "top_logprobs": None, "text_offset": 0}
    return {name: [begin[name], *values] for name, values in rest.items()}


def _prompt_offsets(
    token_ids: Sequence[int], text: str, tokenizer: Tokenizer | None
) -> Sequence[int]:
    """Where in the text of a prompt each of its tokens begins.

    Text that came as such is what its tokens spell, but for one that the tokenizer put in front.
    Where it is not, as normalisation changed it, they are as near as can be.
    """
    if tokenizer is None:
        return [0] * len(token_ids)
    parts = tokenizer.text_parts(token_ids)
    if "".join(parts) != text and token_ids[0] in tokenizer.special_ids:
        parts = ["", *tokenizer.text_parts(token_ids[1:])]
    return [min(begin, len(text)) for begin in accumulate(map(len, parts), initial=0)][:-1]
