"""JSON of answers: in pieces, so that no call holds the interpreter's lock for long."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

_SLICE = 64  # elements that are written at a time
_CHUNK_BYTES = 1 << 16


class Shared(list[Any]):
    """A list that stands in several choices; it is written once."""

    encoded: bytes | None = None


class Joined(tuple[list[Any], ...]):
    """Lists that are written as one."""

    __slots__ = ()


# In ASCII: many clients take U+2028 or U+0085 for the end of a line.
_ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


def encode(value: Mapping[str, Any]) -> bytes:
    """A small object, at once."""
    return _ENCODER.encode(value).encode()


class TextFrame:
    """Bytes that are the same but for one text in JSON, made once for many texts."""

    def __init__(self, make: Callable[[str], list[bytes]]) -> None:
        """`make` gives the bytes with some text in them, in pieces."""
        mark = secrets.token_hex(16)  # nobody who asks for an answer can have put it there
        self._before, self._after = b"".join(make(mark)).split(json.dumps(mark).encode())

    def filled(self, text: str) -> bytes:
        """What `make` would give for `text`."""
        return self._before + json.dumps(text).encode() + self._after


def encode_in_pieces(
    head: Mapping[str, Any], choices: Iterable[Mapping[str, Any]], **tail: Any
) -> list[bytes]:
    """As `encode({**head, "choices": [*choices], **tail})`, for what may be long.

    `head` is not empty; `choices` may be made while they are written.
    """
    pieces = [encode(head)[:-1], b',"choices":[']
    for number, choice in enumerate(choices):
        if number:
            pieces.append(b",")
        pieces += _pieces(choice)
    return [*pieces, b"],", encode(tail)[1:]] if tail else [*pieces, b"]}"]


def in_chunks(pieces: Sequence[bytes]) -> Iterator[bytes]:
    """The same bytes in chunks that are neither small nor large, but for the last."""
    if sum(map(len, pieces)) <= _CHUNK_BYTES:
        yield b"".join(pieces)
        return
    chunk = bytearray()
    for piece in pieces:
        for begin in range(0, len(piece), _CHUNK_BYTES):
            chunk += piece[begin : begin + _CHUNK_BYTES]
            if len(chunk) >= _CHUNK_BYTES:
                yield bytes(chunk)
                chunk.clear()
    if chunk:
        yield bytes(chunk)


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, dict):
        for number, (name, item) in enumerate(value.items()):
            yield f"{',{'[number == 0]}{json.dumps(name)}:".encode()
            yield from _pieces(item)
        yield b"}" if value else b"{}"
    elif isinstance(value, (list, Joined)):
        yield b"["
        lists = value if isinstance(value, Joined) else (value,)
        yield b",".join(filter(None, map(_elements, lists)))
        yield b"]"
    else:
        yield json.dumps(value, allow_nan=False).encode()


def _elements(values: list[Any]) -> bytes:
    """A list without its brackets."""
    if isinstance(values, Shared) and values.encoded is not None:
        return values.encoded
    slices = (values[begin : begin + _SLICE] for begin in range(0, len(values), _SLICE))
    written = map(_ENCODER.encode, slices)
    encoded = ",".join(text[1:-1] for text in written).encode()
    if isinstance(values, Shared):
        values.encoded = encoded
    return encoded
