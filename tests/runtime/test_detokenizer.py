"""Text and stop strings, wherever the pieces of the text begin and end."""

from __future__ import annotations

from functools import cache

from hypothesis import given
from hypothesis import strategies as st

from infc.runtime.text.detokenizer import Detokenizer, StopMatcher
from infc.runtime.text.text_decoders import TextDecoder
from infc.runtime.text.tokenizer import Tokenizer

from .small_artifact import make_tokenizer


@cache
def byte_level() -> Tokenizer:
    return Tokenizer(make_tokenizer())


def opened() -> TextDecoder:
    return byte_level().stream_decoder(skip_special_tokens=True, context=())


def token_id(token: str) -> int:
    found = byte_level().backend.token_to_id(token)
    assert found is not None, token
    return found


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
    ids = byte_level().encode("the cat 你好 sat")
    for stop, expected in (("好", "the cat 你"), ("t 你", "the ca"), ("sat", "the cat 你好 ")):
        decoder = opened()
        detokenizer, text = Detokenizer(decoder, (stop,)), ""
        for token in ids:
            text += detokenizer.push(token)
            if detokenizer.matched_stop:
                break
        assert text + detokenizer.flush() == expected
        assert detokenizer.matched_stop == stop


def test_unfinished_character_and_held_text_come_at_the_end() -> None:
    first = token_id("ä")  # the byte E4, which begins a character of three
    decoder = opened()
    detokenizer = Detokenizer(decoder, ("atx",))
    ids = [*byte_level().encode("cat"), first]
    assert "".join(detokenizer.push(token) for token in ids) == "c"
    assert detokenizer.flush() == "at\ufffd"
    assert detokenizer.matched_stop is None


def test_stop_strings_are_looked_for_after_the_least_number_of_tokens() -> None:
    ids = [token_id(character) for character in "abcabc"]

    def text_of(least: int) -> str:
        decoder = opened()
        detokenizer, text = Detokenizer(decoder, ("bc",), least), ""
        for token in ids:
            text += detokenizer.push(token)
            if detokenizer.matched_stop is not None:
                break
        return text + detokenizer.flush()

    # The first stop string counts only where it begins after that number.
    assert [text_of(least) for least in range(6)] == ["a", "a", "abca", "abca", "abca", "abcabc"]


def test_another_answer_to_the_same_prompt() -> None:
    """A fork has the state of the prompt, and shares nothing that changes."""
    half = [token_id("ä"), token_id("½")]  # E4 BD, which A0 completes
    whole = Detokenizer(byte_level().stream_decoder(skip_special_tokens=True, context=half), ("b",))
    twin = whole.fork()
    assert whole.push(token_id("ł")) + whole.push(token_id("b")) == "\u4f60"
    assert whole.matched_stop == "b"
    assert twin.push(token_id("ł")) + twin.push(token_id("a")) == "\u4f60a"
    assert (twin.matched_stop, whole.num_characters, twin.num_characters) == (None, 2, 2)
