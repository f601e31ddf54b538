"""Streamed text is what the tokenizers library makes of all tokens, over every kind of decoder."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import cache

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models

from infc.runtime.text.text_decoders import (
    ByteLevelDecoder,
    PieceDecoder,
    TextDecoder,
    WindowDecoder,
)
from infc.runtime.text.tokenizer import Tokenizer

from .small_artifact import make_tokenizer

WORDS = ["▁", "▁▁", "▁the", "▁cat", "s", "é", "a▁b", ".", "▁.", "##ing", "word", "end</w>", "'s"]
CHARACTERS = ["é", "你", "🙂", " ", "a", "\n"]


def with_decoder(decoder: decoders.Decoder | None) -> Tokenizer:
    """A vocabulary of words as all kinds write them, every byte, and added tokens."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    model = models.BPE(
        vocab={word: index for index, word in enumerate(words)},
        merges=[],
        unk_token="<unk>",
        byte_fallback=True,
    )
    backend = tokenizers.Tokenizer(model)
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<tool>", special=False)])
    if decoder is not None:
        backend.decoder = decoder
    return Tokenizer(backend)


def as_sentencepiece(start: int, stop: int = 0) -> Tokenizer:
    """As Llama 2 (`start` 1) and Gemma (0)."""
    stages = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if start or stop:
        stages.append(decoders.Strip(" ", start, stop))
    return with_decoder(decoders.Sequence(stages))


KINDS: dict[str, tuple[type, Callable[[], Tokenizer]]] = {
    "byte-level": (ByteLevelDecoder, lambda: Tokenizer(make_tokenizer())),
    "byte-level in a sequence": (
        ByteLevelDecoder,
        lambda: with_decoder(decoders.Sequence([decoders.ByteLevel()])),
    ),
    "gemma": (PieceDecoder, lambda: as_sentencepiece(0)),
    "llama": (PieceDecoder, lambda: as_sentencepiece(1)),
    "two blanks gone": (PieceDecoder, lambda: as_sentencepiece(2)),
    "metaspace": (PieceDecoder, lambda: with_decoder(decoders.Metaspace())),
    "metaspace that prepends nothing": (
        PieceDecoder,
        lambda: with_decoder(decoders.Metaspace(prepend_scheme="never")),
    ),
    "wordpiece": (PieceDecoder, lambda: with_decoder(decoders.WordPiece())),
    "wordpiece as it is": (PieceDecoder, lambda: with_decoder(decoders.WordPiece(cleanup=False))),
    "no decoder": (PieceDecoder, lambda: with_decoder(None)),
    "bpe": (WindowDecoder, lambda: with_decoder(decoders.BPEDecoder())),
}
HAVE_BYTES = {"gemma", "llama", "two blanks gone"}


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    return KINDS[kind][1]()


def opened(tokenizer: Tokenizer, context: Sequence[int] = (), skip: bool = True) -> TextDecoder:
    return tokenizer.stream_decoder(skip_special_tokens=skip, context=context)


def stream(decoder: TextDecoder, ids: Sequence[int]) -> str:
    return "".join(map(decoder.push, ids))


def ids_of(tokenizer: Tokenizer, *tokens: str) -> list[int]:
    ids = [tokenizer.backend.token_to_id(token) for token in tokens]
    assert None not in ids, tokens
    return [index for index in ids if index is not None]


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    return ids_of(tokenizer, *(f"<0x{byte:02X}>" for byte in data))


@st.composite
def tokens_in_order(draw: st.DrawFn, kind: str) -> list[int]:
    """Any tokens; where some are bytes, in an order in which they make characters or none.

    The library gives up also the characters beside a byte that makes none.
    """
    tokenizer = tokenizer_of(kind)
    size = tokenizer.backend.get_vocab_size()
    if kind not in HAVE_BYTES:
        return draw(st.lists(st.integers(0, size + 1), max_size=20))
    word = st.sampled_from([*WORDS, "<s>", "</s>", "<tool>", "<unk>"]).map(
        lambda token: ids_of(tokenizer, token)
    )
    unknown = st.just([size + 7])
    whole = st.sampled_from(CHARACTERS).map(lambda c: byte_ids(tokenizer, c.encode()))
    broken = st.sampled_from([b"\xff", b"\xe4\xbd", b"\xa0\xe4", b"\xf0\x9f\x99", b"\xc0\xaf"]).map(
        lambda data: [*ids_of(tokenizer, "s"), *byte_ids(tokenizer, data), *ids_of(tokenizer, "s")]
    )
    units = draw(st.lists(word | unknown | whole | broken, max_size=12))
    ids = list(itertools.chain(*units))
    if draw(st.booleans()):  # an end inside a character
        ids += [
            *ids_of(tokenizer, "s"),
            *byte_ids(tokenizer, "🙂".encode()[: draw(st.integers(1, 3))]),
        ]
    return ids


@pytest.mark.parametrize("kind", KINDS)
@given(st.data(), st.booleans())
def test_streamed_text_is_the_whole_text(kind: str, data: st.DataObject, skip: bool) -> None:
    """Also that of an answer: what it adds to the whole characters of its prompt."""
    tokenizer = tokenizer_of(kind)
    ids = data.draw(tokens_in_order(kind))
    expected = tokenizer.decode(ids, skip_special_tokens=skip)
    decoder = opened(tokenizer, skip=skip)
    assert isinstance(decoder, KINDS[kind][0])
    assert stream(decoder, ids) + decoder.flush() == expected
    cut = data.draw(st.integers(0, len(ids)))
    prompt = stream(opened(tokenizer, skip=skip), ids[:cut])
    decoder = opened(tokenizer, ids[:cut], skip)
    for each in (decoder.fork(), decoder):
        answer = stream(each, ids[cut:]) + each.flush()
        if tokenizer.decode(ids[cut:], skip_special_tokens=skip):
            assert prompt + answer == expected
        elif kind != "bpe":  # which adds the blank of the word before
            assert answer in ("", expected[len(prompt) :])


@pytest.mark.parametrize("kind", KINDS)
@given(st.lists(st.integers(0, 280), max_size=40), st.integers(0, 40))
def test_any_tokens_in_any_order(kind: str, ids: list[int], cut: int) -> None:
    decoder = opened(tokenizer_of(kind), ids[:cut])
    for token_id in ids[cut:]:
        decoder.push(token_id)
    decoder.flush()
    assert decoder.flush() == ""


@given(st.text(max_size=20))
def test_never_half_a_character(text: str) -> None:
    backend = tokenizer_of("byte-level").backend
    decoder = opened(tokenizer_of("byte-level"))
    parts = [*map(decoder.push, backend.encode(text).ids), decoder.flush()]
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


def test_characters_stand_beside_bytes_that_make_none() -> None:
    tokenizer = tokenizer_of("gemma")
    ids = byte_ids(tokenizer, b"\xe4\xbd\xa0\xff\xe5\xa5\xbd")
    decoder = opened(tokenizer)
    assert stream(decoder, ids) + decoder.flush() == "你\ufffd好"


@pytest.mark.parametrize("kind", ["gemma", "llama", "byte-level in a sequence"])
def test_an_answer_has_all_of_the_character_that_it_completes(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    if kind in HAVE_BYTES:
        ids = byte_ids(tokenizer, "你好".encode())
    else:
        ids = byte_level_ids("你好")
        tokenizer = tokenizer_of("byte-level")
    for cut, expected in enumerate(["你好", "你好", "你好", "好", "好", "好"]):
        decoder = opened(tokenizer, ids[:cut])
        assert stream(decoder, ids[cut:]) + decoder.flush() == expected, cut


def byte_level_ids(text: str) -> list[int]:
    """A token for every byte."""
    backend = tokenizer_of("byte-level").backend
    alphabet = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    ids = [backend.token_to_id(c) for word, _ in alphabet.pre_tokenize_str(text) for c in word]
    return [index for index in ids if index is not None]


@pytest.mark.parametrize("kind", ["gemma", "byte-level"])
def test_an_answer_that_does_not_complete_the_character(kind: str) -> None:
    """One that says nothing has no text, whatever its prompt lacks."""
    tokenizer = tokenizer_of(kind)
    half = byte_ids(tokenizer, b"\xe4") if kind == "gemma" else byte_level_ids("你")[:1]
    (more,) = ids_of(tokenizer, "s")
    assert opened(tokenizer, half).flush() == ""
    decoder = opened(tokenizer, half)
    assert stream(decoder, [more]) + decoder.flush() == "\ufffds"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("byte-level")])
@pytest.mark.parametrize("count", [0, 1, 5, 6, 12, 100])
def test_tokens_that_are_left_out_change_nothing(kind: str, count: int) -> None:
    tokenizer = tokenizer_of(kind)
    word, more = ids_of(tokenizer, "word", "▁cat")
    (end,) = ids_of(tokenizer, "</s>")
    decoder = opened(tokenizer, [end] * 8)
    ids = [word, *[end] * count, more]
    assert stream(decoder, ids) + decoder.flush() == tokenizer.decode([word, more])
    after = opened(tokenizer, [word, *[end] * count])
    assert stream(after, [more]) + after.flush() == tokenizer.decode([word, more])[len("word") :]


@pytest.mark.parametrize(
    "stages",
    [
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 0, 1)],
        [decoders.Replace(Regex("▁+"), " "), decoders.Fuse(), decoders.Replace("word", "Word")],
    ],
    ids=["blanks at the end", "replaced at last"],
)
def test_decoders_that_look_at_the_whole_text(stages: list[decoders.Decoder]) -> None:
    """Nothing is lost where more tokens change what was there."""
    tokenizer = with_decoder(decoders.Sequence(stages))
    decoder = opened(tokenizer)
    assert isinstance(decoder, WindowDecoder)
    ids = ids_of(tokenizer, "word", "▁cat", "▁", "s", "▁the", "é", "word", "s")
    assert stream(decoder, ids) + decoder.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_cost_does_not_grow_with_the_length(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    bad = byte_ids(tokenizer, b"\xff")[0] if kind != "byte-level" else byte_level_ids("你")[1]

    def once(count: int) -> float:
        decoder = opened(tokenizer)
        start = time.perf_counter()
        for _ in range(count):
            decoder.push(bad)
        return time.perf_counter() - start

    def seconds(count: int) -> float:
        return min(once(count) for _ in range(3))

    # A quadratic one would take a hundred times as long.
    assert seconds(10_000) < 50 * max(seconds(1000), 1e-4)
