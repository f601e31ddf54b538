"""A tokenizer that makes much of little is refused, as the library would end the process."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers

from infc.ir.errors import ArtifactError, RequestError
from infc.runtime.text.tokenizer import Tokenizer
from infc.runtime.text.tokenizer_growth import max_text_characters


def make(normalizer: Any = None, decoder: Any = None) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0}, []))
    if normalizer is not None:
        backend.normalizer = normalizer
    if decoder is not None:
        backend.decoder = decoder
    return backend


DOUBLE = [normalizers.Replace("a", "aa")] * 40


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Sequence(DOUBLE),
        normalizers.Sequence(
            [normalizers.Sequence(DOUBLE[:20]), normalizers.Sequence(DOUBLE[20:])]
        ),
        normalizers.Sequence([normalizers.Replace(Regex(""), "a")] * 40),
        normalizers.Sequence([normalizers.Prepend("aaaaaaaaa")] * 9),
        normalizers.Replace("a", "a" * 9999),
    ],
)
def test_a_normalizer_that_takes_all_memory_is_refused(normalizer: Any) -> None:
    with pytest.raises(ArtifactError, match="one character into up to"):
        Tokenizer(make(normalizer))


def test_a_decoder_that_takes_all_memory_is_refused() -> None:
    with pytest.raises(ArtifactError, match="one character into up to"):
        Tokenizer(make(decoder=decoders.Sequence([decoders.Replace("a", "aa")] * 40)))


def test_a_text_that_would_grow_too_long() -> None:
    tokenizer = Tokenizer(
        make(normalizers.Sequence(DOUBLE[:11])), chat_template="{{ 'a' * 140000 }}"
    )
    most = max_text_characters(tokenizer.backend)
    assert most == 1 << 17
    with pytest.raises(RequestError, match=f"at most {most}") as caught:
        tokenizer.encode("a" * (most + 1))
    assert caught.value.field == "prompt"
    with pytest.raises(RequestError, match=f"at most {most}") as caught:
        tokenizer.encode_chat([{"role": "user", "content": ""}])
    assert caught.value.field == "messages"


def test_a_panic_of_the_library_is_the_requests_alone(capfd: pytest.CaptureFixture[str]) -> None:
    steps = [normalizers.Replace("", "c"), normalizers.NFC(), normalizers.Replace("", "c")]
    source = "{{ messages[0].content }}"
    tokenizer = Tokenizer(make(normalizers.Sequence(steps)), chat_template=source)
    text = "\u1e9b\U0001d160\U0001d160b \u0323\u4f60\u1f82\u1f82\u00e9"
    with pytest.raises(RequestError, match="the tokenizer fails on the prompt"):
        tokenizer.encode(text)
    with pytest.raises(RequestError, match="the tokenizer fails on the messages"):
        tokenizer.encode_chat([{"role": "user", "content": text}])
    assert "panicked" in capfd.readouterr().err


STEP = st.sampled_from(
    [
        normalizers.Replace("a", "bc"), normalizers.Replace("bc", "a"), normalizers.NFKC(),
        normalizers.Replace(Regex("b+"), "a"), normalizers.NFD(), normalizers.Lowercase(),
        normalizers.Prepend("\u2581"), normalizers.ByteLevel(),
        normalizers.BertNormalizer(strip_accents=False), normalizers.Nmt(), normalizers.NFC(),
        normalizers.Strip(),
    ]
)  # fmt: skip
TEXT = st.text(
    "abc \u0130\ufdfa\u1f82\U0001d160\u4f60\u00e9\ufb03\u1e9b\u0323", min_size=1, max_size=9
)


@given(steps=st.lists(STEP, max_size=3), text=TEXT)
def test_no_text_grows_more_than_is_thought(steps: list[Any], text: str) -> None:
    normalizer = normalizers.Sequence(steps)
    try:
        most = max_text_characters(make(normalizer))
    except ArtifactError:
        return
    growth = (1 << 28) / most
    assert len(normalizer.normalize_str(text)) <= growth * len(text) + growth
