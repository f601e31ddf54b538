"""Texts: bundled ones and files as token ids, chats through the template, bad ones refused."""

import hashlib
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.driver.texts import (
    BUNDLED,
    CALIBRATION,
    EVALUATION,
    MAX_TEXT_BYTES,
    Document,
    Text,
    TokenText,
    checkpoint_tokenizer,
    read_text,
    tokenize,
)
from infc.ir.errors import UsageError
from infc.runtime.text.tokenizer import Tokenizer

from ..test_layout import ROOT

TINY = ROOT / "recipes/tiny/checkpoint"
VOCABULARY = 4096
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    """The tokenizer of the bundled model without its chat template."""
    found = checkpoint_tokenizer(TINY, vocab_size=VOCABULARY)
    assert found is not None and found.has_chat_template
    return Tokenizer(found.backend)


@pytest.fixture(scope="module")
def chatty(plain: Tokenizer) -> Tokenizer:
    """The same one with a template that takes no tools."""
    return Tokenizer(plain.backend, chat_template=TEMPLATE, special_tokens={})


def decoded(text: Text, tokenizer: Tokenizer) -> list[str]:
    found = tokenize(text, tokenizer, vocab_size=VOCABULARY, max_tokens=10_000)
    return [tokenizer.decode(document) for document in found.documents]


def test_the_bundled_texts_are_large_enough_and_apart(plain: Tokenizer) -> None:
    texts = [read_text(name) for name in BUNDLED]
    sizes = [
        tokenize(text, plain, vocab_size=VOCABULARY, max_tokens=1 << 20).num_tokens
        for text in texts
    ]
    assert sizes[0] >= 8_000
    assert 2_000 <= sizes[1] <= 4_000
    # No eight words of the evaluation stand in the calibration.
    runs = [
        {
            tuple(words[i : i + 8])
            for document in text.documents
            for words in [str(document.text or document.messages).split()]
            for i in range(len(words) - 7)
        }
        for text in texts
    ]
    assert runs[0] & runs[1] == set()
    assert len(runs[0]) > 3_000


def test_a_bundled_text_is_hashed_as_its_readme_says() -> None:
    for name, folder in ((CALIBRATION, "calibration"), (EVALUATION, "evaluation")):
        listed = subprocess.run(
            "LC_ALL=C sha256sum * | sha256sum",
            shell=True,
            cwd=ROOT / "recipes/texts" / folder,
            capture_output=True,
            text=True,
            check=True,
        )
        assert read_text(name).sha256 == listed.stdout.split()[0]


def test_a_file_is_one_document_under_its_own_hash(tmp_path: Path, plain: Tokenizer) -> None:
    (tmp_path / "a.txt").write_bytes("zwölf\r\nBoote\n".encode())
    text = read_text("a.txt", tmp_path)
    assert text.name == "a.txt"
    assert text.sha256 == hashlib.sha256((tmp_path / "a.txt").read_bytes()).hexdigest()
    assert decoded(text, plain) == ["zwölf\r\nBoote\n"]


def test_a_mark_in_front_of_utf8_is_no_part_of_a_text(tmp_path: Path) -> None:
    """Some editors write it; it is three tokens of many models, and no JSON begins with it."""
    for name, content in (("a.txt", "a text"), ("b.jsonl", '{"text": "a text"}')):
        (tmp_path / name).write_bytes(content.encode("utf-8-sig"))
        found = read_text(name, tmp_path)
        assert [one.text for one in found.documents] == ["a text"]
        assert found.sha256 == hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()


def test_whole_surrogate_pairs_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    assert [one.text for one in read_text("a.jsonl", tmp_path).documents] == ["\U0001f600"]


def test_chats_go_through_the_template(tmp_path: Path, plain: Tokenizer, chatty: Tokenizer) -> None:
    rows = (
        '{"messages": [{"role": "user", "content": "hi"},'
        ' {"role": "assistant", "content": "yes"}]}',
        "",
        '{"text": "plain\u2028text"}',
        '{"messages": [{"role": "tool", "content": "refused"}]}',
    )
    (tmp_path / "b.jsonl").write_text("\n".join(rows))
    text = read_text(str(tmp_path / "b.jsonl"))
    assert decoded(text, chatty) == ["[user] hi\n[assistant] yes\n", "plain\u2028text", "refused"]
    assert decoded(text, plain)[0] == "hi\n\nyes"


def test_tokens_are_counted_over_documents(plain: Tokenizer) -> None:
    text = Text("x", "0", (Document("x:1", "one two three " * 9), Document("x:2", "four " * 99)))
    found = tokenize(text, plain, vocab_size=VOCABULARY, max_tokens=40)
    assert found.num_tokens == 40 and len(found.documents) == 2
    windows = list(found.windows(16))
    assert [len(window) for window in windows] == [16, 16, 8]
    assert [t for window in windows for t in window] == [t for d in found.documents for t in d]
    assert found.as_data() == {"name": "x", "sha256": "0", "tokens": 40}


@given(
    documents=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=40), min_size=1),
    length=st.integers(2, 20),
    begins=st.booleans(),
)
def test_every_window_begins_as_texts_do(
    documents: list[list[int]], length: int, begins: bool
) -> None:
    """With the first token of the model, where documents have it; nothing else changes."""
    first = (0,) if begins else ()
    text = TokenText("x", "0", tuple((*first, *one) for one in documents), 0)
    windows = list(text.windows(length))
    assert all(1 <= len(one) <= length for one in windows)
    assert all(one[: len(first)] == first for one in windows)
    rest = [token for one in windows for token in one[len(first) :]]
    assert rest == [token for one in documents for token in one]


def test_a_shortened_text_keeps_a_share_of_each_document() -> None:
    text = TokenText("x", "0", (tuple(range(90)), tuple(range(200, 210)), (7,)))
    assert text.shortened(101) is text
    short = text.shortened(51)
    assert short.documents == (tuple(range(45)), tuple(range(200, 205)))
    assert text.shortened(0).documents == ()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", b"r\xe9sum\xe9", "not UTF-8 text (byte 1) (convert it to UTF-8)"),
        ("wide.txt", "a text".encode("utf-16-le"), "no text, but other data: it holds a null char"),
        ("wide.jsonl", '{"text": "a"}'.encode("utf-16-le"), "wide.jsonl: no text, but other data"),
        ("h.jsonl", b'\n{"text": "a \\udc00"}', "h.jsonl:2: text holds half of a surrogate pair"),
        (
            "i.jsonl",
            b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
            "i.jsonl:1: messages[0] holds half of a surrogate pair",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl:2: not JSON"),
        ("b.jsonl", b'\n["text"]', "b.jsonl:2: expected an object with either text or messages"),
        ("c.jsonl", b'{"text": "a", "messages": []}', "c.jsonl:1: expected an object with either"),
        ("d.jsonl", b'{"text": 3}', "d.jsonl:1: text is not a string"),
        ("e.jsonl", b'{"messages": []}', "e.jsonl:1: messages is not a list"),
        ("f.jsonl", b'{"messages": [{"role": "user"}]}', "messages[0] does not have a role"),
        ("g.jsonl", b"[" * 100_000, "g.jsonl:1: not JSON"),
    ],
)
def test_a_bad_text_is_refused_by_line(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_text(name, tmp_path)
    assert message in str(caught.value)


def test_a_missing_an_endless_and_a_short_text_are_refused(
    tmp_path: Path, plain: Tokenizer
) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_text("gone.txt", tmp_path)
    with (tmp_path / "large.txt").open("wb") as file:
        file.truncate(MAX_TEXT_BYTES + 1)
    with pytest.raises(UsageError, match=f"larger than {MAX_TEXT_BYTES >> 20} MiB"):
        read_text("large.txt", tmp_path)
    with pytest.raises(UsageError, match="x: too little text: 1 tokens, at least 64 are needed"):
        tokenize(
            Text("x", "0", (Document("x", "a"),)),
            plain,
            vocab_size=VOCABULARY,
            max_tokens=99,
            least_tokens=64,
        )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("~nosuchuser/a.txt", "~nosuchuser/a.txt: there is no such user (write the path"),
        ("a\0b", r"a\0b: the text cannot be read: its name holds a null character (name a"),
        ("pipe", "pipe: the text cannot be read: not a regular file (name a file of text"),
        (".", "the text cannot be read: not a regular file"),
        ("/dev/zero", "/dev/zero: the text cannot be read: not a regular file"),
        ("a" * 300, "the text cannot be read: File name too long"),
    ],
)
def test_what_is_no_file_is_refused(name: str, message: str, tmp_path: Path) -> None:
    """At once: opening a pipe would wait for a writer."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError) as caught:
        read_text(name, tmp_path)
    assert message in str(caught.value)
    assert "\0" not in str(caught.value)


def test_tokens_that_the_model_does_not_have_are_refused(plain: Tokenizer) -> None:
    text = Text("x", "0", (Document("x", "some words"),))
    with pytest.raises(UsageError, match="and the model has 3"):
        tokenize(text, plain, vocab_size=3, max_tokens=99)


def test_a_checkpoint_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    said: list[str] = []
    assert checkpoint_tokenizer(tmp_path, vocab_size=3, log=said.append) is None
    assert "no tokenizer" in said[0]
