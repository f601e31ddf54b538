"""Where each token begins in the text of its answer, whatever is held back on the way."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infc.runtime.requests.outputs import CompletionOutput, RequestOutput, merge_outputs
from infc.runtime.sampling.sampling_params import SamplingParams
from infc.runtime.server.logprobs import TokenNames
from infc.runtime.text.tokenizer import Tokenizer

from .engines import make_engine
from .test_text_decoders import as_sentencepiece, with_decoder

PROMPT = [3, 4, 5]


@cache
def tokenizer() -> Tokenizer:
    """Half of its tokens are bytes, so that many characters are begun and few completed."""
    return as_sentencepiece(1)


@cache
def answer(
    seed: int, stop: str = "", n: int = 1, best_of: int | None = None
) -> tuple[RequestOutput, ...]:
    """What each step gives."""
    size = tokenizer().backend.get_vocab_size()
    engine = make_engine(size, tokenizer())
    chosen = SamplingParams(
        temperature=1.0,
        seed=seed,
        max_tokens=20,
        logprobs=0,
        stop=stop or (),
        # Words and a few bytes, of which some make characters.
        allowed_token_ids=[*range(257, size), 1 + 0x61, 1 + 0xC3, 1 + 0xA9],
        n=n,
        best_of=best_of,
    )
    engine.add_request("r", PROMPT, chosen)
    parts = []
    while engine.has_unfinished:
        parts += engine.step()
    return tuple(parts)


def check(whole: CompletionOutput, texts: TokenNames) -> None:
    assert whole.text_offsets is not None
    assert len(whole.text_offsets) == len(whole.token_ids)
    assert list(whole.text_offsets) == sorted(whole.text_offsets)
    assert all(0 <= offset <= len(whole.text) for offset in whole.text_offsets)
    for token_id, begin in zip(whole.token_ids, whole.text_offsets, strict=True):
        name = texts.describe(token_id)[0]
        if token_id >= 257 and token_id not in tokenizer().special_ids:
            left = whole.text[begin:].lstrip("\ufffd")  # of bytes that the token cuts off
            spelled = (name, name.lstrip(" "))  # the first of all loses its blank
            assert left.startswith(spelled) or any(one.startswith(left) for one in spelled)


@given(st.integers(0, 30), st.data())
@settings(max_examples=60)
def test_each_token_begins_where_its_text_does(seed: int, data: st.DataObject) -> None:
    texts = TokenNames(tokenizer())
    whole = merge_outputs(answer(seed)).outputs[0]
    check(whole, texts)
    if not whole.text:
        return
    begin = data.draw(st.integers(0, len(whole.text) - 1))
    stop = whole.text[begin : begin + data.draw(st.integers(1, 6))]
    parts = answer(seed, stop)
    stopped = merge_outputs(parts).outputs[0]
    assert whole.text.startswith(stopped.text)
    check(stopped, texts)
    # What was told of a token on the way never changes, and none comes before its text can.
    given, length = [], 0
    for part in parts:
        length += len(part.outputs[0].text)
        given += list(part.outputs[0].text_offsets or ())
        assert all(offset <= length for offset in given)
    assert tuple(given) == stopped.text_offsets


@pytest.mark.parametrize("choices", [{"n": 3}, {"n": 1, "best_of": 3}])
def test_of_several_answers_each_has_its_own(choices: dict[str, int]) -> None:
    for completion in merge_outputs(answer(5, **choices)).outputs:
        check(completion, TokenNames(tokenizer()))


def test_no_two_tokens_have_the_same_name() -> None:
    """Words, byte tokens and added tokens may all spell the same text."""
    for each in (tokenizer(), with_decoder(None)):
        texts, size = TokenNames(each), each.backend.get_vocab_size()
        names = [texts.describe(token_id)[0] for token_id in range(size)]
        assert len(set(names)) == size
    (plain, as_byte) = (each.backend.token_to_id(token) for token in ("s", "<0x73>"))
    assert plain is not None and as_byte is not None
    assert texts.describe(plain) == ("s", b"s")
    assert texts.describe(as_byte) == ("bytes:\\x73", b"s")


def test_added_tokens_of_a_byte_level_vocabulary() -> None:
    """As GPT-NeoX has them: runs of blanks are added, and are in the vocabulary as well."""
    from .small_artifact import make_tokenizer

    backend = make_tokenizer()
    inner = backend.token_to_id("the")
    backend.add_tokens(["\u0120\u0120", "  ", " the"])
    each = Tokenizer(backend)
    texts, size = TokenNames(each), backend.get_vocab_size()
    names = [texts.describe(token_id)[0] for token_id in range(size)]
    assert len(set(names)) == size
    assert inner is None or texts.describe(inner)[0] == "the"
