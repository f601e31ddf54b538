"""The text of a request that goes on in another engine, cut inside characters and stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from infc.runtime.requests.outputs import CompletionOutput
from infc.runtime.text.tokenizer import Tokenizer

from .resuming import PROMPT, byte_level, byte_tokens, dictated, resumption
from .test_text_decoders import KINDS, tokenizer_of


def check_every_cut(
    tokenizer: Tokenizer,
    token_ids: Sequence[int],
    fields: dict[str, Any],
    prompt: Sequence[int] = PROMPT,
) -> list[CompletionOutput]:
    """Cut after each token, it tells exactly what it would have; what each step told."""
    parts = dictated(tokenizer, token_ids, fields, prompt=prompt)
    for count in range(1, len(parts)):
        rest = dictated(tokenizer, token_ids, fields, resumption(parts[:count]), prompt)
        assert [part.outputs for part in rest] == [part.outputs for part in parts[count:]]
    return [part.outputs[0] for part in parts]


def texts(text: str, tokens: list[int] | None = None, prompt: str = "", **fields: Any) -> list[str]:
    """The text of each step for an answer of these bytes; whatever the cut."""
    ids = byte_tokens(text) if tokens is None else tokens
    known = [*PROMPT, *byte_tokens(prompt)]
    pieces = check_every_cut(byte_level(), ids, {"logprobs": 0, **fields}, known)
    assert check_every_cut(byte_level(), ids, fields, known)[-1].text == pieces[-1].text
    return [piece.text for piece in pieces]


def test_in_the_middle_of_a_character() -> None:
    assert texts("aéñb") == ["a", "", "é", "", "ñ", "b"]
    assert texts("", byte_tokens("aé")[:-1]) == ["a", "\ufffd"]
    half = byte_tokens("é")[:1]
    assert texts("", [*half, *half, *byte_tokens("b")]) == ["", "\ufffd", "\ufffdb"]


def test_in_the_middle_of_a_stop_string() -> None:
    assert texts("xabcd", stop="abc") == ["x", "", "", ""]
    assert texts("xabz", stop="abc") == ["x", "", "", "abz"]
    assert texts("xab", stop="abc") == ["x", "", "ab"]
    assert texts("aabaabd", stop=["aabd", "never"]) == ["", "", "", "aab", "", "", ""]
    assert texts("xéb", stop="éñ") == ["x", "", "", "éb"]
    assert texts("éé", stop="é", min_tokens=3) == ["", "é", "", ""]


def test_where_the_prompt_ends_inside_a_character() -> None:
    """What the told tokens mean follows from the prompt, as far as it goes and no further."""
    ids = [*PROMPT, byte_tokens("é")[0]]
    pieces = check_every_cut(byte_level(), [byte_tokens("é")[1], *byte_tokens("ab")], {}, ids)
    assert [piece.text for piece in pieces] == ["é", "a", "b"]


@given(st.sampled_from(sorted(KINDS)), st.data())
@settings(max_examples=60)
def test_any_tokens_of_any_vocabulary(kind: str, data: st.DataObject) -> None:
    tokenizer = tokenizer_of(kind)
    size = tokenizer.backend.get_vocab_size()
    some = st.integers(0, size - 1) | st.integers(max(0, size - 17), size - 1)
    if kind in ("gemma", "llama"):  # bytes of é and 🙂 by their tokens
        some |= st.sampled_from([1 + byte for byte in "é🙂".encode()])
    ids = data.draw(st.lists(some, min_size=2, max_size=9))
    prompt = [*PROMPT[:2], *data.draw(st.lists(some, max_size=3))]
    fields: dict[str, Any] = {
        "logprobs": data.draw(st.sampled_from([None, 0])),
        "min_tokens": data.draw(st.sampled_from([0, 0, 2])),
        "skip_special_tokens": data.draw(st.booleans()),
    }
    whole = "".join(piece.text for piece in check_every_cut(tokenizer, ids, fields, prompt))
    if len(whole) > 1:
        begin = data.draw(st.integers(0, len(whole) - 2))
        stop = whole[begin : begin + data.draw(st.integers(1, 4))]
        specials = tokenizer.special_texts
        if not any(special in stop or stop in special for special in specials):
            fields["stop"] = [stop, f"{whole[0]}never"]
            check_every_cut(tokenizer, ids, fields, prompt)
