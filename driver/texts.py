"""Texts that models are calibrated and evaluated on: bundled ones or files, as token ids."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..ir.errors import RequestError, UsageError

if TYPE_CHECKING:
    from ..runtime.text.tokenizer import Tokenizer

CALIBRATION: Final = "general-calibration"
EVALUATION: Final = "general-evaluation"
BUNDLED: Final = (CALIBRATION, EVALUATION)
"""Texts that are part of infc: prose and code, of which calibration and evaluation share none."""

MAX_TEXT_BYTES: Final = 1 << 26
_MAX_TOKEN_CHARACTERS: Final = 64
"""Of a text of so many characters a token, the rest is not tokenized."""
_HALF: Final = re.compile("[\ud800-\udfff]")
_SOURCES = Path(__file__).resolve().parents[1] / "recipes/texts"
_BUNDLED_FOLDERS: Final = {CALIBRATION: "calibration", EVALUATION: "evaluation"}
_MESSAGES, _TEXT = "messages", "text"
_MARK: Final = "\ufeff"
"""What some editors write in front of UTF-8; no model expects it."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text, or the messages of a chat; `place` says where it is from (`chat.jsonl:3`)."""

    place: str
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Text:
    """Documents, under a name without a directory and the SHA-256 (in hex) of their bytes.

    Of several files (`general-calibration`) it is that of what `sha256sum *` prints in their
    directory.
    """

    name: str
    sha256: str
    documents: tuple[Document, ...]


@dataclass(frozen=True, slots=True)
class TokenText:
    """A text as token ids, a sequence a document; never empty.

    `first` is the token that texts of the model begin with, if there is one.
    """

    name: str
    sha256: str
    documents: tuple[tuple[int, ...], ...]
    first: int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(map(len, self.documents))

    def as_data(self) -> dict[str, str | int]:
        """What identifies it, as plain data for reports."""
        return {"name": self.name, "sha256": self.sha256, "tokens": self.num_tokens}

    def shortened(self, max_tokens: int) -> TokenText:
        """At most so many tokens: of each document its beginning, all in the same proportion."""
        if self.num_tokens <= max_tokens:
            return self
        parts = (one[: len(one) * max_tokens // self.num_tokens] for one in self.documents)
        return replace(self, documents=tuple(part for part in parts if part))

    def windows(self, length: int) -> Iterator[tuple[int, ...]]:
        """Sequences of `length` tokens, the last one shorter; documents follow each other.

        If documents begin with the model's first token, every window does: some models expect it,
        and give states at the first position that no other token has.
        """
        first: tuple[int, ...] = ()
        documents = self.documents
        if self.first is not None and length > 1 and documents[0][0] == self.first:
            first = (self.first,)
            documents = tuple(one[1:] if one[0] == self.first else one for one in documents)
        joined = [token for document in documents for token in document]
        step = length - len(first)
        for start in range(0, len(joined), step):
            yield (*first, *joined[start : start + step])


def read_text(source: str, directory: Path = Path()) -> Text:
    """The text that `source` names: one of `BUNDLED`, or a file relative to `directory`.

    A file that ends in `.jsonl` has a JSON object in each line: `{"text": ...}`, or
    `{"messages": [...]}` with a chat as the API takes it; any other is one document of plain text.
    Raises UsageError for what is no regular file or cannot be read, is not UTF-8, or has a bad row,
    with its line.
    """
    if source in _BUNDLED_FOLDERS:
        return _read_bundled(source)
    try:
        path = directory / Path(source).expanduser()
    except RuntimeError:  # its message is about Python
        raise UsageError(
            "there is no such user", where=source, hint="write the path of the file without ~"
        ) from None
    data = _read_bytes(path, source)
    return Text(path.name, hashlib.sha256(data).hexdigest(), tuple(_documents(path, data)))


def tokenize(
    text: Text,
    tokenizer: Tokenizer,
    *,
    vocab_size: int | None,
    max_tokens: int,
    least_tokens: int = 2,
) -> TokenText:
    """The first `max_tokens` tokens of a text, or all if there are fewer.

    Chats are rendered by the model's template; where it has none, or refuses a chat, their messages
    are joined by empty lines. Raises UsageError for fewer than `least_tokens` tokens, and for
    tokens that the model does not have (`vocab_size` None: nobody knows yet).
    """
    found: list[tuple[int, ...]] = []
    left = max_tokens
    for document in text.documents:
        if left <= 0:
            break
        ids = _encode(document, tokenizer, left)[:left]
        if ids and vocab_size is not None and max(ids) >= vocab_size:
            raise UsageError(
                f"the tokenizer gives token {max(ids)}, and the model has {vocab_size}",
                where=document.place,
                hint="the tokenizer belongs to another model",
            )
        found += [tuple(ids)] if ids else []
        left -= len(ids)
    result = TokenText(text.name, text.sha256, tuple(found), tokenizer.bos_token_id)
    if result.num_tokens < least_tokens:
        raise UsageError(
            f"too little text: {result.num_tokens} tokens, at least {least_tokens} are needed",
            where=text.name,
            hint=f"name a longer file, or one of {', '.join(BUNDLED)}",
        )
    return result


def _encode(document: Document, tokenizer: Tokenizer, max_tokens: int) -> list[int]:
    limit = max_tokens * _MAX_TOKEN_CHARACTERS
    try:
        if document.text is not None:
            return tokenizer.encode(document.text[:limit])
        if tokenizer.has_chat_template:
            try:
                return tokenizer.encode_chat(document.messages, max_characters=limit)
            except RequestError:
                pass  # a template may refuse a role, or a chat that does not begin with the user
        return tokenizer.encode(_joined(document.messages)[:limit])
    except RequestError as error:
        raise UsageError(f"it cannot be tokenized: {error.message}", where=document.place) from None


def _joined(messages: Sequence[Mapping[str, Any]]) -> str:
    return "\n\n".join(str(message["content"]) for message in messages)


@functools.cache
def _read_bundled(name: str) -> Text:
    directory = _SOURCES / _BUNDLED_FOLDERS[name]
    documents: list[Document] = []
    listing = hashlib.sha256()
    for path in sorted(path for path in directory.iterdir() if path.is_file()):
        data = _read_bytes(path, str(path))
        listing.update(f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode())
        documents += _documents(path, data)
    return Text(name, listing.hexdigest(), tuple(documents))


def _read_bytes(path: Path, named: str) -> bytes:
    def refuse(problem: str) -> UsageError:
        known = ", ".join(BUNDLED)
        where = str(path).replace("\0", "\\0")
        hint = f"name a file of text or JSONL, or one of {known}" if named == path.name else None
        return UsageError(f"the text cannot be read: {problem}", where=where, hint=hint)

    try:
        # Opening a pipe would wait for a writer, and a device may have no end.
        if not stat.S_ISREG(path.stat().st_mode):
            raise refuse("not a regular file")
        with path.open("rb") as file:
            data = file.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise refuse(error.strerror or str(error)) from None
    except ValueError:
        raise refuse("its name holds a null character") from None
    if len(data) > MAX_TEXT_BYTES:
        raise UsageError(f"larger than {MAX_TEXT_BYTES >> 20} MiB", where=str(path))
    return data


def _documents(path: Path, data: bytes) -> Iterator[Document]:
    hint = "convert it to UTF-8"
    try:
        text = data.decode("utf-8").removeprefix(_MARK)
    except UnicodeDecodeError as error:
        problem = f"not UTF-8 text (byte {error.start})"
        raise UsageError(problem, where=str(path), hint=hint) from None
    if (place := text.find("\0")) >= 0:
        problem = f"no text, but other data: it holds a null character (number {place})"
        raise UsageError(problem, where=str(path), hint=hint)
    if path.suffix != ".jsonl":
        yield Document(path.name, text)
        return
    # Not splitlines(): JSON strings may contain the other characters that it splits at.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield _row(line, f"{path.name}:{number}", f"{path}:{number}")


def _row(line: str, place: str, where: str) -> Document:
    def refuse(problem: str) -> UsageError:
        return UsageError(
            problem, where=where, hint='such as {"text": "..."} or {"messages": [..]}'
        )

    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise refuse(f"not JSON: {error}") from None
    if not isinstance(row, dict) or (_TEXT in row) == (_MESSAGES in row):
        raise refuse(f"expected an object with either {_TEXT} or {_MESSAGES}")
    if _TEXT in row:
        if not isinstance(row[_TEXT], str):
            raise refuse(f"{_TEXT} is not a string")
        if not _is_unicode(row[_TEXT]):
            raise refuse(f"{_TEXT} holds half of a surrogate pair")
        return Document(place, row[_TEXT])
    messages = row[_MESSAGES]
    if not isinstance(messages, list) or not messages:
        raise refuse(f"{_MESSAGES} is not a list with at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not _is_message(message):
            raise refuse(f"{_MESSAGES}[{index}] does not have a role and content, both strings")
        if not _is_unicode(message["role"] + message["content"]):
            raise refuse(f"{_MESSAGES}[{index}] holds half of a surrogate pair")
    return Document(place, messages=tuple(messages))


def _is_message(message: Mapping[str, Any]) -> bool:
    return isinstance(message.get("role"), str) and isinstance(message.get("content"), str)


def _is_unicode(text: str) -> bool:
    """Whether a string of JSON, in which halves of surrogate pairs can be written, is text."""
    return _HALF.search(text) is None


def checkpoint_tokenizer(
    model: Path, *, vocab_size: int | None = None, log: Callable[[str], None] = lambda _: None
) -> Tokenizer | None:
    """The tokenizer of a checkpoint as its artifacts have it; None if it has none.

    Raises CheckpointError if it cannot be read.
    """
    import tempfile

    from ..frontend.tokenizer import write_tokenizer
    from ..runtime.text.tokenizer import Tokenizer

    with tempfile.TemporaryDirectory(prefix="infc-tokenizer-") as place:
        directory = Path(place)
        files = write_tokenizer(model, directory, vocab_size=vocab_size, log=log)
        if files is None:
            return None
        return Tokenizer.open(directory, files, lambda name: (directory / name).read_text("utf-8"))
