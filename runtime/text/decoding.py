"""A vocabulary that only turns tokens into text, for processes that are given tokens.

The library keeps every token twice, and all merges: 40 MB for 150 000 tokens, read in 0.2 s of CPU
time. Engine processes need the texts alone, once.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import accumulate

import msgspec

from .text_decoders import is_byte_level, laid_flat


class _Added(msgspec.Struct, gc=False):
    id: int
    content: str
    special: bool = False


class _Model(msgspec.Struct):
    vocab: dict[str, int]
    type: str = ""


class _File(msgspec.Struct):
    model: _Model
    added_tokens: list[_Added] = []
    decoder: msgspec.Raw = msgspec.Raw(b"null")


class _Decoder:
    """As the library has it, for who reads its settings."""

    def __init__(self, state: bytes) -> None:
        self._state = state

    def __getstate__(self) -> bytes:
        return self._state


class DecodingBackend:
    """The part of `tokenizers.Tokenizer` that a byte-level vocabulary needs to give text."""

    normalizer = None

    def __init__(self, tokens: Sequence[str], added: Sequence[_Added], decoder: bytes) -> None:
        self._text = "".join(tokens)
        self._ends = array("I", accumulate(map(len, tokens), initial=0))
        self._added = {each.id: each for each in added}
        self.decoder = _Decoder(decoder)

    def no_truncation(self) -> None:
        """Nothing is encoded."""

    def no_padding(self) -> None:
        """Nothing is encoded."""

    def get_added_tokens_decoder(self) -> dict[int, _Added]:
        """Tokens beside those of the model, by id."""
        return self._added

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the file has it; None for an id that is none."""
        if not 0 <= token_id < len(self._ends) - 1:
            return None
        return self._text[self._ends[token_id] : self._ends[token_id + 1]] or None


def decoding_backend(text: str) -> DecodingBackend | None:
    """Of a `tokenizer.json`; None where the library has to read it.

    That is any vocabulary that is not byte-level, and a file in which it would correct something.
    """
    try:
        file = msgspec.json.decode(text, type=_File)
        stages = list(laid_flat(msgspec.json.decode(file.decoder) or {"type": ""}))
    except (msgspec.MsgspecError, UnicodeError, KeyError):
        return None
    vocab, added = file.model.vocab, file.added_tokens
    if file.model.type != "BPE" or not is_byte_level(stages) or not vocab:
        return None
    new = [each for each in added if each.content not in vocab]
    fits = all(vocab.get(each.content, each.id) == each.id for each in added)
    # As the library numbers them.
    fits = fits and [each.id for each in new] == list(range(len(vocab), len(vocab) + len(new)))
    size, ids = len(vocab) + len(new), set(vocab.values())
    if not fits or len(ids) != len(vocab) or min(ids) < 0 or max(ids) >= size:
        return None
    if not all(each.content for each in added) or not ids.isdisjoint(each.id for each in new):
        return None
    tokens = [""] * size
    for token, token_id in vocab.items():
        tokens[token_id] = token
    for each in new:
        tokens[each.id] = each.content
    return DecodingBackend(tokens, added, bytes(file.decoder))
