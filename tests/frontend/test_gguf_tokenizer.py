"""Tokenizers of GGUF files cut texts as llama.cpp does; what they lack is refused by key."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer as Backend

from infc.frontend.sources.base import SourceTokenizer
from infc.frontend.sources.gguf.pretokenizers import PRE_TOKENIZERS
from infc.frontend.sources.open import open_source
from infc.frontend.tokenizer import write_tokenizer
from infc.ir.errors import CheckpointError
from infc.runtime.text.tokenizer import Tokenizer

from ..checkpoints import CHAT_TEMPLATE
from ..configs.base import BOS_ID, EOS_ID
from ..gguf_files import byte_alphabet, finish, write_byte_tokenizer

Write = Callable[[gguf.GGUFWriter], None]


def file(path: Path, write: Write) -> Path:
    """A file of nothing but a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    write(writer)
    finish(writer)
    return path


def read(path: Path, write: Write) -> SourceTokenizer:
    found = open_source(file(path, write)).read_tokenizer(None)
    assert found is not None
    return found


def test_byte_level(tmp_path: Path) -> None:
    found = read(tmp_path / "t.gguf", write_byte_tokenizer)
    backend = Backend.from_str(found.text)
    tokens = backend.encode("a the<|im_end|>é<think>").tokens
    assert tokens == ["<s>", "a", "Ġth", "e", "<|im_end|>", "Ã", "©", "<think>"]
    assert backend.decode(backend.encode("a the é").ids) == "a the é"
    assert found.bos == (BOS_ID,)
    assert found.eos == (EOS_ID, tokens_id(backend, "<|im_end|>"))  # stated, and known by its name
    assert found.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    assert list(found.special_texts) == ["<s>", "</s>", "<|im_end|>"]
    assert found.templates == {"default": CHAT_TEMPLATE}


def tokens_id(backend: Backend, token: str) -> int:
    found = backend.token_to_id(token)
    assert isinstance(found, int)
    return found


def test_written_tokenizer_chats(tmp_path: Path) -> None:
    path = file(tmp_path / "t.gguf", write_byte_tokenizer)
    files = write_tokenizer(path, tmp_path / "out", vocab_size=320, log=lambda _: None)
    assert files is not None
    assert (files.bos, files.eos) == (BOS_ID, (EOS_ID, 260))
    tokenizer = Tokenizer.open(
        tmp_path / "out", files, lambda name: (tmp_path / "out" / name).read_text("utf-8")
    )
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "<user>hi</s><assistant>"


def test_a_file_without_tokenizer_takes_ids(tmp_path: Path) -> None:
    path = file(tmp_path / "t.gguf", lambda writer: writer.add_tokenizer_model("none"))
    lines: list[str] = []
    assert write_tokenizer(path, tmp_path / "out", log=lines.append) is None
    assert lines == ["no tokenizer in t.gguf: the artifact takes and gives token ids only"]


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_every_way_to_cut_words_can_be_read(name: str, tmp_path: Path) -> None:
    found = read(tmp_path / "t.gguf", lambda writer: write_byte_tokenizer(writer, name))
    backend = Backend.from_str(found.text)
    text = "It's 12345, naïve 漢字!\n\n  x"
    assert backend.decode(backend.encode(text).ids) == text


# Pieces that llama.cpp makes of the same text.
TEXT = "it'S 12345 HTTPServer!!\n\n  x"
PIECES = {
    "gpt-2": ["it", "'", "S", " 12345", " HTTPServer", "!!", "\n\n ", " x"],
    "smollm": ["it", "'", "S", " ", "1", "2", "3", "4", "5", " HTTPServer", "!!", "\n\n ", " x"],
    "qwen2": ["it", "'S", " ", "1", "2", "3", "4", "5", " HTTPServer", "!!\n\n", " ", " x"],
    "llama-bpe": ["it", "'S", " ", "123", "45", " HTTPServer", "!!\n\n", " ", " x"],
    "tekken": ["it", "'S", " ", "1", "2", "3", "4", "5", " HTTPServer", "!!\n\n", " ", " x"],
    "deepseek-v3": ["it", "'S", " ", "123", "45", " HTTPServer", "!!\n\n", " ", " x"],
    "default": ["it", "'", "S", " ", "123", "45", " HTTPServer", "!!", "\n\n ", " x"],
}


@pytest.mark.parametrize("name", PIECES)
def test_words_are_cut_as_llama_cpp_does(name: str, tmp_path: Path) -> None:
    found = read(tmp_path / "t.gguf", lambda writer: write_byte_tokenizer(writer, name))
    splits = Backend.from_str(found.text).pre_tokenizer
    assert splits is not None
    spans = [span for _, span in splits.pre_tokenize_str(TEXT)]
    assert [TEXT[begin:end] for begin, end in spans] == PIECES[name]


def test_a_name_implies_what_a_file_does_not_state(tmp_path: Path) -> None:
    def write(writer: gguf.GGUFWriter) -> None:
        tokens = [*byte_alphabet(), "<s>", "Ġth", "th"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list(tokens)
        writer.add_token_merges(["t h"])
        writer.add_bos_token_id(256)

    backend = Backend.from_str(read(tmp_path / "t.gguf", write).text)
    # It begins texts, and takes a word that is a token whole, without merges.
    assert backend.encode("x th").tokens == ["<s>", "x", "Ġth"]


PIECE_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
PIECE_TOKENS += ["▁", "h", "i", "hi", "▁hi", "▁h", "<end_of_turn>", "  "]
PIECE_SCORES = [0.0] * 259 + [-5.0, -6.0, -7.0, -2.0, -1.0, -3.0, 0.0, 0.0]
PIECE_TYPES = [2, 3, 3, *([6] * 256), 1, 1, 1, 1, 1, 1, 3, 4]


def write_pieces(writer: gguf.GGUFWriter, **changes: Any) -> None:
    values = {"tokens": PIECE_TOKENS, "scores": PIECE_SCORES, "types": PIECE_TYPES, **changes}
    writer.add_tokenizer_model("llama")
    writer.add_token_list(values["tokens"])
    if values["scores"] is not None:
        writer.add_token_scores(values["scores"])
    writer.add_token_types(values["types"])


def test_sentencepiece(tmp_path: Path) -> None:
    found = read(tmp_path / "t.gguf", write_pieces)
    backend = Backend.from_str(found.text)
    # The best score first, a space in front, bytes for what is no token.
    assert backend.encode("hi hié").tokens == ["<s>", "▁hi", "▁hi", "<0xC3>", "<0xA9>"]
    # In front of what follows a special token as well; two spaces are a token of their own.
    tokens = backend.encode("hi<end_of_turn>hi  h").tokens
    assert tokens == ["<s>", "▁hi", "<end_of_turn>", "▁hi", "  ", "▁h"]
    assert backend.decode(backend.encode("hi hié").ids) == "hi hié"
    assert (found.bos, found.eos) == ((1,), (2, 265))


def test_sentencepiece_without_a_space_in_front(tmp_path: Path) -> None:
    def write(writer: gguf.GGUFWriter) -> None:
        write_pieces(writer)
        writer.add_add_space_prefix(False)
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(True)

    backend = Backend.from_str(read(tmp_path / "t.gguf", write).text)
    assert backend.encode("hi hi").tokens == ["hi", "▁hi", "</s>"]
    assert backend.decode(backend.encode(" hi").ids) == " hi"


def without(key: str) -> Write:
    """The byte-level tokenizer without one of its keys."""

    def write(writer: gguf.GGUFWriter) -> None:
        write_byte_tokenizer(writer)
        del writer.kv_data[0][f"tokenizer.ggml.{key}"]

    return write


def with_value(key: str, value: Any, kind: gguf.GGUFValueType) -> Write:
    def write(writer: gguf.GGUFWriter) -> None:
        without(key)(writer)
        writer.add_key_value(f"tokenizer.ggml.{key}", value, kind, gguf.GGUFValueType.STRING)

    return write


ARRAY, STRING, BOOL = (gguf.GGUFValueType[kind] for kind in ("ARRAY", "STRING", "BOOL"))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (without("tokens"), r"tokenizer.ggml.tokens: is missing from the metadata"),
        (without("merges"), r"tokenizer.ggml.merges: is missing from the metadata"),
        (
            lambda writer: write_byte_tokenizer(writer, "novel-bpe"),
            r"tokenizer.ggml.pre: .* into words by 'novel-bpe', which is not known \(known: a.x",
        ),
        (with_value("merges", ["Ġt"], ARRAY), r"merges: holds 'Ġt', which are not two parts"),
        (with_value("merges", ["Ġ tt"], ARRAY), r"the tokenizer cannot be read: .*tt"),
        (with_value("tokens", ["a", "a"], ARRAY), r"tokens: holds the token 'a' twice"),
        (
            with_value("tokens", ["a", "\u00e9" * 2049], ARRAY),
            r"tokens: holds a token of 4098 bytes \(number 1\), expected 4096 or fewer",
        ),
        (with_value("tokens", "abc", STRING), r"tokens: is b'abc', expected a list of texts"),
        (with_value("tokens", ["a", "b"], ARRAY), r"token_type: is a list of 320, expected 2 num"),
        (lambda writer: write_pieces(writer, scores=None), r"scores: is missing from the meta"),
        (
            lambda writer: write_pieces(writer, scores=[1.0]),
            r"scores: is a list of 1, expected 267",
        ),
        (
            lambda writer: write_pieces(writer, scores=[float("nan")] * 267),
            r"scores: holds NaN or infinity",
        ),
        (
            with_value("add_bos_token", "yes", STRING),
            r"add_bos_token: is b'yes', expected true or false",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_named(write: Write, message: str, tmp_path: Path) -> None:
    path = file(tmp_path / "t.gguf", write)
    with pytest.raises(CheckpointError, match=message):
        open_source(path).read_tokenizer(None)


def test_a_long_token_takes_no_time(tmp_path: Path) -> None:
    """The merges that it implies would take hours."""
    tokens = [*PIECE_TOKENS[:-1], "a" * 2_000_000]
    path = file(tmp_path / "t.gguf", lambda writer: write_pieces(writer, tokens=tokens))
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="holds a token of 2000000 bytes"):
        open_source(path).read_tokenizer(None)
    assert time.monotonic() - start < 5


def test_a_token_may_be_as_long_as_that(tmp_path: Path) -> None:
    tokens = [*PIECE_TOKENS[:-1], "a" * 4096]
    found = read(tmp_path / "t.gguf", lambda writer: write_pieces(writer, tokens=tokens))
    assert len(found.text) > 4096


def test_more_tokens_than_the_model_has_are_refused_early(tmp_path: Path) -> None:
    path = file(tmp_path / "t.gguf", write_byte_tokenizer)
    with pytest.raises(CheckpointError, match="tokens: holds 320 tokens, and the model has 319"):
        open_source(path).check_tokenizer(319)


def test_special_ids_that_no_token_has_are_left_out(tmp_path: Path) -> None:
    def write(writer: gguf.GGUFWriter) -> None:
        without("bos_token_id")(writer)
        writer.add_bos_token_id(4_000_000_000)

    found = read(tmp_path / "t.gguf", write)
    assert found.bos == ()
    assert Backend.from_str(found.text).encode("a").tokens == ["a"]
