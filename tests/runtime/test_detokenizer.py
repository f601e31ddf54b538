"""Streaming text: equal to whole decode, whole characters, stop strings wherever they split."""

from __future__ import annotations

import time
from functools import cache

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from infc.runtime.detokenizer import (
    ByteLevelDecoder,
    Detokenizer,
    StopMatcher,
    TextDecoder,
    TokenTexts,
    WindowDecoder,
    open_decoder,
)

from .small_artifact import make_tokenizer


@cache
def byte_level() -> Tokenizer:
    return make_tokenizer()


@cache
def shared() -> TokenTexts:
    return TokenTexts(byte_level())


@cache
def sentencepiece_like() -> Tokenizer:
    """As Llama 2: a mark for blanks, bytes as a fallback, the first blank taken away."""
    words = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁the", "▁cat", "s", "é"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def token_id(backend: Tokenizer, token: str) -> int:
    found = backend.token_to_id(token)
    assert found is not None, token
    return found


def stream(decoder: TextDecoder, tokens: list[int]) -> list[str]:
    return [*(decoder.push(token) for token in tokens), decoder.flush()]


tokens = st.lists(st.integers(0, byte_level().get_vocab_size() - 1), max_size=40)


@given(tokens, st.booleans())
def test_byte_level_equals_whole_decode(ids: list[int], skip: bool) -> None:
    """Whatever the tokens, also where their bytes are no UTF-8 at all."""
    backend = byte_level()
    decoder = open_decoder(backend, frozenset({0, 1}), skip_special_tokens=skip, texts=shared())
    assert isinstance(decoder, ByteLevelDecoder)
    assert "".join(stream(decoder, ids)) == backend.decode(ids, skip_special_tokens=skip)


@given(st.text(max_size=20))
def test_byte_level_never_gives_half_a_character(text: str) -> None:
    backend = byte_level()
    ids = backend.encode(text).ids
    parts = stream(open_decoder(backend, frozenset(), skip_special_tokens=True), ids)
    assert "".join(parts) == text
    assert all("\ufffd" not in part for part in parts) or "\ufffd" in text


@given(st.lists(st.sampled_from(["▁the", "▁cat", "s", "é", "▁", "好", "🙂", "x"]), max_size=20))
def test_window_decoder_equals_whole_decode(words: list[str]) -> None:
    backend = sentencepiece_like()
    ids: list[int] = []
    for word in words:
        known = backend.token_to_id(word)
        if known is not None:
            ids.append(known)
        else:
            ids += [token_id(backend, f"<0x{byte:02X}>") for byte in word.encode()]
    decoder = open_decoder(backend, frozenset(), skip_special_tokens=True)
    assert isinstance(decoder, WindowDecoder)
    parts = stream(decoder, ids)
    assert "".join(parts) == backend.decode(ids)
    assert all("\ufffd" not in part for part in parts)


def test_window_decoder_keeps_the_blank_after_a_prompt() -> None:
    backend = sentencepiece_like()
    the, cat = token_id(backend, "▁the"), token_id(backend, "▁cat")
    after = open_decoder(backend, frozenset(), skip_special_tokens=True, context=[the])
    assert "".join(stream(after, [cat])) == " cat"
    first = open_decoder(backend, frozenset(), skip_special_tokens=True, context=[1])
    assert "".join(stream(first, [cat])) == "cat"


@given(st.lists(st.integers(0, 260), max_size=40))
def test_window_decoder_takes_any_tokens(ids: list[int]) -> None:
    decoder = WindowDecoder(sentencepiece_like(), skip_special_tokens=True)
    for token in ids:
        decoder.push(token)
        assert len(decoder._held) < 6
    decoder.flush()


def test_cost_does_not_grow_with_the_length() -> None:
    backend = sentencepiece_like()
    bad = token_id(backend, "<0xFF>")

    def seconds(count: int) -> float:
        decoder = WindowDecoder(backend, skip_special_tokens=True)
        start = time.perf_counter()
        for _ in range(count):
            decoder.push(bad)
        return time.perf_counter() - start

    # A quadratic one would take a hundred times as long.
    assert seconds(10_000) < 50 * max(seconds(1000), 1e-4)


letters = st.text(alphabet="ab", max_size=12)
stops = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=4)


def first_stop(text: str, found: list[str]) -> str:
    """The text before the stop string that is complete first, the longest of those."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in found if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))]
    return text


@given(st.lists(letters, max_size=8), stops)
def test_stop_strings_however_the_text_is_split(parts: list[str], found: list[str]) -> None:
    matcher, given_out = StopMatcher(found), ""
    whole = "".join(parts)
    expected = first_stop(whole, found)
    for part in parts:
        given_out += matcher.push(part)
        assert expected.startswith(given_out), "text that belongs to a stop string went out"
        if matcher.matched is not None:
            assert matcher.matched in found
            break
    else:
        assert expected == whole
        given_out += matcher.flush()
    assert given_out == expected


@given(st.lists(letters, max_size=8), stops)
def test_no_more_is_held_back_than_a_stop_string_may_need(
    parts: list[str], found: list[str]
) -> None:
    matcher, given_out, seen = StopMatcher(found), "", ""
    for part in parts:
        given_out += matcher.push(part)
        seen += part
        if matcher.matched is not None:
            return
        held = seen[len(given_out) :]
        assert not held or any(stop.startswith(held) for stop in found)


def test_stop_string_inside_a_character_and_at_the_end() -> None:
    backend = byte_level()
    ids = backend.encode("the cat 你好 sat").ids
    for stop, expected in (("好", "the cat 你"), ("t 你", "the ca"), ("sat", "the cat 你好 ")):
        decoder = open_decoder(backend, frozenset(), skip_special_tokens=True)
        detokenizer, text = Detokenizer(decoder, (stop,)), ""
        for token in ids:
            text += detokenizer.push(token)
            if detokenizer.matched_stop:
                break
        assert text + detokenizer.flush() == expected
        assert detokenizer.matched_stop == stop


def test_unfinished_character_and_held_text_come_at_the_end() -> None:
    backend = byte_level()
    first = token_id(backend, "ä")  # the byte E4, which begins a character of three
    decoder = open_decoder(backend, frozenset(), skip_special_tokens=True)
    detokenizer = Detokenizer(decoder, ("atx",))
    ids = [*backend.encode("cat").ids, first]
    assert "".join(detokenizer.push(token) for token in ids) == "c"
    assert detokenizer.flush() == "at\ufffd"
    assert detokenizer.matched_stop is None


def test_stop_strings_are_looked_for_after_the_least_number_of_tokens() -> None:
    backend = byte_level()
    ids = [token_id(backend, character) for character in "abcabc"]

    def text_of(least: int) -> str:
        decoder = open_decoder(backend, frozenset(), skip_special_tokens=True)
        detokenizer, text = Detokenizer(decoder, ("bc",), least), ""
        for token in ids:
            text += detokenizer.push(token)
            if detokenizer.matched_stop is not None:
                break
        return text + detokenizer.flush()

    # The first stop string counts only where it begins after that number.
    assert [text_of(least) for least in range(6)] == ["a", "a", "abca", "abca", "abca", "abcabc"]
