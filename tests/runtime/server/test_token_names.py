"""What single tokens are called, and where they begin in the text of a completion."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import tokenizers

from infc.runtime.text.tokenizer import Tokenizer

from .serving import Serving, serving

PIECES = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\n", "▁", "▁a", "b", "é", "<end>"]


def byte_fallback_tokenizer() -> Tokenizer:
    """Has a newline both as a token of its own and as a byte, and a special token."""
    vocabulary = {piece: index for index, piece in enumerate(PIECES)}
    model = tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    backend.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend)


@pytest.fixture(scope="module")
def byte_server() -> Iterator[Serving]:
    with serving(tokenizer=byte_fallback_tokenizer()) as server:
        yield server


def test_tokens_of_equal_text_do_not_overwrite_each_other(byte_server: Serving) -> None:
    newline, as_byte = PIECES.index("\n"), PIECES.index("<0x0A>")
    found = {}
    for token in (newline, as_byte):
        body = {"model": "toy", "prompt": "b", "max_tokens": 1, "logprobs": 1}
        answer = byte_server.post("/v1/completions", {**body, "allowed_token_ids": [token]}).json()
        (choice,) = answer["choices"]
        assert choice["text"] == "\n"
        (name,) = choice["logprobs"]["tokens"]
        (top,) = choice["logprobs"]["top_logprobs"]
        assert top[name] == choice["logprobs"]["token_logprobs"][0]
        found[name] = top[name]
    assert list(found) == ["\n", "bytes:\\x0a"]
    assert len(set(found.values())) == 2


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("prompt", ["b a\n", "é", [258, 260, 0xC3 + 1]], ids=["a", "b", "half"])
@pytest.mark.parametrize("stop", ["b", "b\nb", " a"])
def test_text_offsets_index_the_text(
    byte_server: Serving, prompt: str | list[int], echo: bool, stop: str
) -> None:
    """Whatever tokens are called, whatever is left out, held back, or cut off by a stop string."""
    allowed = [PIECES.index(piece) for piece in ("\n", "▁", "▁a", "b", "é", "<end>")]
    body = {
        **{"model": "toy", "prompt": prompt, "echo": echo, "stop": stop, "logprobs": 0, "seed": 4},
        "allowed_token_ids": [*allowed, 0xC3 + 1, 0xA9 + 1],
        "max_tokens": 30,
    }
    choice = byte_server.post("/v1/completions", body).json()["choices"][0]
    text, logprobs = choice["text"], choice["logprobs"]
    offsets = logprobs["text_offset"]
    assert offsets == sorted(offsets) and len(offsets) == len(logprobs["tokens"])
    for name, begin in zip(logprobs["tokens"], offsets, strict=True):
        assert 0 <= begin <= len(text)
        if name != "<end>" and not name.startswith("bytes:"):
            left = text[begin:].lstrip("\ufffd")
            assert left.startswith(name) or name.startswith(left)
    if echo:
        assert text.startswith(prompt if isinstance(prompt, str) else " b")
    streamed: dict[str, list[Any]] = {name: [] for name in logprobs}
    parts, stream_body = "", {**body, "stream": True}
    for line in byte_server.post("/v1/completions", stream_body).text.splitlines():
        if line.startswith("data: {"):
            part = json.loads(line[6:])["choices"][0]
            parts += part["text"]
            for name, values in (part["logprobs"] or {}).items():
                streamed[name] += values
    assert (parts, streamed) == (text, logprobs)


def test_bytes_of_tokens_are_those_of_the_text(server: Serving) -> None:
    """Special tokens have a name and no bytes: the text leaves them out."""
    body = {
        **{"model": "toy", "messages": [{"role": "user", "content": "a"}], "max_tokens": 20},
        **{"logprobs": True, "top_logprobs": 1, "ignore_eos": True, "seed": 1},
        "allowed_token_ids": [0, 1, 2, 70, 80, 90],
    }
    choice = server.post("/v1/chat/completions", body).json()["choices"][0]
    entries = choice["logprobs"]["content"]
    special = [entry for entry in entries if entry["bytes"] is None]
    assert 0 < len(special) < len(entries)
    assert all(entry["token"].startswith("<|") for entry in special)
    data = b"".join(bytes(entry["bytes"] or []) for entry in entries)
    assert data.decode(errors="replace") == choice["message"]["content"]
