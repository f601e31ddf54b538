"""The tokenizer of a GGUF file as a `tokenizer.json`: byte-level BPE, or SentencePiece's BPE."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ....ir.errors import CheckpointError, UnsupportedModelError
from .metadata import Metadata
from .pretokenizers import PRE_TOKENIZERS

_TOKENS, _TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_SCORES, _MERGES = "tokenizer.ggml.scores", "tokenizer.ggml.merges"
_MODEL, _PRE = "tokenizer.ggml.model", "tokenizer.ggml.pre"
_NORMAL, _UNKNOWN, _CONTROL, _USER = 1, 2, 3, 4
_SPACE: Final = "\u2581"
_KINDS: Final = ("gpt2", "llama")
_MAX_TOKEN_BYTES: Final = 4096
"""Of one token: the merges that it implies take time in the square of its length."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a file by their ids, and the type of each."""

    kind: str
    tokens: Sequence[str]
    types: Sequence[int]

    def id_of(self, metadata: Metadata, name: str, default: int | None = None) -> int | None:
        """A special token's id: as the file states it, or the default of its kind."""
        key = f"tokenizer.ggml.{name}_token_id"
        found = metadata.optional_count(key, low=0, high=(1 << 32) - 1)
        chosen = default if found is None else found
        return chosen if chosen is not None and chosen < len(self.tokens) else None


def read_vocabulary(metadata: Metadata, vocab_size: int | None) -> Vocabulary | None:
    """The tokens of a file, checked; None for a file without any.

    `vocab_size` is the model's: more tokens are refused. Raises CheckpointError, naming the key,
    UnsupportedModelError for a tokenizer or a way of cutting words that is not known.
    """
    kind = metadata.text(_MODEL, "none")
    if kind in ("none", "no_vocab"):
        return None
    if kind not in _KINDS:
        raise UnsupportedModelError(
            f"the tokenizer {kind!r} is not supported",
            where=f"{metadata.path}: {_MODEL}",
            hint=f"supported: {', '.join(_KINDS)}",
        )
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(_token_texts(metadata))]
    if vocab_size is not None and len(tokens) > vocab_size:
        raise metadata.error(_TOKENS, f"holds {len(tokens)} tokens, and the model has {vocab_size}")
    if len(set(tokens)) != len(tokens):
        twice = _first_twice(tokens)
        raise metadata.error(_TOKENS, f"holds the token {twice!r} twice")
    stated = metadata.numbers(_TYPES, len(tokens))
    types = [_NORMAL] * len(tokens) if stated is None else [int(one) for one in stated]
    if kind == "gpt2":
        _pre_tokenizer_name(metadata)
        metadata.texts(_MERGES)
    else:
        _scores(metadata, len(tokens))
    return Vocabulary(kind, tokens, types)


def _token_texts(metadata: Metadata) -> list[str]:
    texts = metadata.texts(_TOKENS)
    for number, text in enumerate(texts):
        size = len(text.encode())
        if size > _MAX_TOKEN_BYTES:
            raise metadata.error(
                _TOKENS,
                f"holds a token of {size} bytes (number {number}), expected {_MAX_TOKEN_BYTES}"
                " or fewer",
            )
    return texts


def _first_twice(tokens: Sequence[str]) -> str:
    seen: set[str] = set()
    for token in tokens:
        if token in seen:
            return token
        seen.add(token)
    raise AssertionError("no token occurs twice")


def _pre_tokenizer_name(metadata: Metadata) -> str:
    name = metadata.text(_PRE, "default")
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModelError(
            f"texts would be cut into words by {name!r}, which is not known",
            where=f"{metadata.path}: {_PRE}",
            hint=f"known: {', '.join(sorted(PRE_TOKENIZERS))}",
        )
    return name


def _scores(metadata: Metadata, length: int) -> Sequence[float]:
    scores = metadata.numbers(_SCORES, length)
    if scores is None:
        raise metadata.error(_SCORES, "is missing from the metadata")
    return scores


def tokenizer_text(vocabulary: Vocabulary, metadata: Metadata) -> str:
    """The text of a `tokenizer.json` that cuts texts into the tokens that llama.cpp makes of them.

    Raises CheckpointError where the file's parts do not fit together.
    """
    made = (
        _byte_level(vocabulary, metadata)
        if vocabulary.kind == "gpt2"
        else _sentencepiece(vocabulary, metadata)
    )
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added(vocabulary, metadata)),
        **made,
    }
    text = json.dumps(data, ensure_ascii=False)
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception for whatever is wrong
        raise CheckpointError(
            f"the tokenizer cannot be read: {error}", where=str(metadata.path)
        ) from None
    return text


def _byte_level(vocabulary: Vocabulary, metadata: Metadata) -> dict[str, Any]:
    pre = PRE_TOKENIZERS[_pre_tokenizer_name(metadata)]
    byte_level = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
    }  # fmt: skip
    splits = [
        {"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False}
        for one in pre.patterns
    ]
    merges = [_cut(merge, metadata) for merge in metadata.texts(_MERGES)]
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "post_processor": _ends(vocabulary, metadata, begins=pre.begins),
        "decoder": byte_level,
        "model": _bpe(vocabulary, merges, ignore_merges=pre.whole),
    }


def _cut(merge: str, metadata: Metadata) -> tuple[str, str]:
    at = merge.find(" ", 1)
    if at < 0:
        raise metadata.error(_MERGES, f"holds {merge!r}, which are not two parts")
    return merge[:at], merge[at + 1 :]


def _bpe(
    vocabulary: Vocabulary, merges: Sequence[tuple[str, str]], **options: Any
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **options,
        "vocab": {token: number for number, token in enumerate(vocabulary.tokens)},
        "merges": merges,
    }


def _sentencepiece(vocabulary: Vocabulary, metadata: Metadata) -> dict[str, Any]:
    prefix = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    before = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    unknown = vocabulary.id_of(metadata, "unknown", 0)
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*before, spaces]},
        "pre_tokenizer": None,
        "post_processor": _ends(vocabulary, metadata, begins=True),
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": _bpe(
            vocabulary,
            _implied_merges(vocabulary, _scores(metadata, len(vocabulary.tokens))),
            unk_token=None if unknown is None else vocabulary.tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


def _implied_merges(vocabulary: Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, the best score first, as SentencePiece merges."""
    ids = {token: number for number, token in enumerate(vocabulary.tokens)}
    order = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    merges: list[tuple[str, str]] = []
    for number in order:
        token = vocabulary.tokens[number]
        if len(token) > 1:
            cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
            merges += [(left, right) for left, right in cuts if left in ids and right in ids]
    return merges


def _ends(vocabulary: Vocabulary, metadata: Metadata, *, begins: bool) -> dict[str, Any] | None:
    """What begins and ends every text, where anything does."""
    default = 1 if vocabulary.kind == "llama" else 11
    first = vocabulary.id_of(metadata, "bos", default)
    last = vocabulary.id_of(metadata, "eos", 2 if vocabulary.kind == "llama" else 11)
    around = [
        first if metadata.flag("tokenizer.ggml.add_bos_token", begins) else None,
        last if metadata.flag("tokenizer.ggml.add_eos_token", False) else None,
    ]
    if around == [None, None]:
        return None
    special = [None if one is None else vocabulary.tokens[one] for one in around]
    pieces = [
        None if one is None else {"SpecialToken": {"id": one, "type_id": 0}} for one in special
    ]
    sequence: list[Any] = [pieces[0], {"Sequence": {"id": "A", "type_id": 0}}, pieces[1]]
    second: list[Any] = [{"Sequence": {"id": "B", "type_id": 1}}]
    single = [one for one in sequence if one is not None]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, *second],
        "special_tokens": {
            token: {"id": token, "ids": [number], "tokens": [token]}
            for token, number in zip(special, around, strict=True)
            if token is not None
        },
    }


def _added(vocabulary: Vocabulary, metadata: Metadata) -> Iterator[dict[str, Any]]:
    """Tokens that are found in a text as they are, before anything is cut or merged."""
    trims = _trims_after(metadata)
    for number, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        special = _is_special(token, kind)
        if special or kind == _USER:
            yield {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": trims and token not in _NOT_TRIMMED,
                "normalized": False,
                "special": special,
            }


def _is_special(token: str, kind: int) -> bool:
    """What ends an answer is special whatever a file says of its type."""
    return kind in (_CONTROL, _UNKNOWN) or token in _END_NAMES


def special_texts(vocabulary: Vocabulary) -> list[str]:
    """The texts of all special tokens."""
    pairs = zip(vocabulary.tokens, vocabulary.types, strict=True)
    return [token for token, kind in pairs if _is_special(token, kind)]


_NOT_TRIMMED: Final = ("<unk>", "<s>", "<|endoftext|>")


def _trims_after(metadata: Metadata) -> bool:
    """Whether special tokens swallow the space behind them: llama.cpp tells Phi 3 by its name."""
    name = metadata.text("general.name", "").lower()
    return "phi-3" in name or "phi3" in name


_END_NAMES: Final = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|eom_id|>"),
        *("<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<end_of_utterance>", "<eos>"),
        *("<EOT>", "_<EOT>", "[EOT]", "<｜end▁of▁sentence｜>"),
    }
)
"""Tokens that end an answer wherever a vocabulary has them: many files name one end alone."""


def end_tokens(vocabulary: Vocabulary, metadata: Metadata) -> tuple[int, ...]:
    """The ids that end an answer: what the file states first, then those known by their names."""
    default = 2 if vocabulary.kind == "llama" else None
    stated = [
        vocabulary.id_of(metadata, "eos", default),
        vocabulary.id_of(metadata, "eot"),
        vocabulary.id_of(metadata, "eom"),
    ]
    named = [i for i, token in enumerate(vocabulary.tokens) if token in _END_NAMES]
    texts = {vocabulary.tokens[i] for i in named}
    if {"<|return|>", "<|call|>"} <= texts:  # a part of an answer ends so, and not the answer
        named = [i for i in named if vocabulary.tokens[i] != "<|end|>"]
    return tuple(dict.fromkeys(i for i in [*stated, *named] if i is not None))


def chat_templates(metadata: Metadata) -> dict[str, str]:
    """The templates of a file by name: `default` is the one without a name."""
    prefix = "tokenizer.chat_template"
    found = {
        key.removeprefix(prefix).removeprefix(".") or "default": metadata.text(key)
        for key in sorted(metadata.values)
        if key == prefix or key.startswith(f"{prefix}.")
    }
    return {name: text for name, text in found.items() if text}
