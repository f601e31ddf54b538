"""Text that knows which of its characters the chat template wrote, whatever is done with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, SupportsIndex

from .template_meter import PIECE, take

FROM_TEMPLATE: Final = 1
"""A character of the template's own literals, or of the tokenizer's special tokens."""
END: Final = 2
"""One that ends the message which the answer goes on with."""
TAG: Final = 4
"""One that stands in for the end of an empty message, and is taken out again."""


class ChatText(str):
    """A string with the origin of each character, the bits of a byte; 0 is all from outside.

    A plain `str` is text from outside altogether, so that an operation which loses track of origins
    makes text out of a control token, and never a control token out of text.
    """

    __slots__ = ("origins",)
    origins: bytes

    def __str__(self) -> str:
        return self

    def __getitem__(self, index: SupportsIndex | slice) -> str:
        found = str.__getitem__(self, index)
        if isinstance(index, slice):
            return with_origins(found, self.origins[index])
        return with_origins(found, bytes((self.origins[index],)))

    def __iter__(self) -> Iterator[str]:
        pairs = zip(str.__iter__(self), self.origins, strict=True)
        return (with_origins(char, bytes((origin,))) for char, origin in pairs)


def with_origins(text: str, origins: bytes) -> str:
    """The text with these origins; a plain string where all of it came from outside."""
    assert len(text) == len(origins)
    if not origins.strip(b"\0"):
        return plain(text)
    result = ChatText(plain(text))
    result.origins = origins
    return result


def from_template(text: str) -> str:
    """Text that the template may turn into control tokens."""
    return with_origins(text, bytes((FROM_TEMPLATE,)) * len(text))


def plain(text: str) -> str:
    """The characters alone."""
    return text if type(text) is str else str.__str__(text)


def origins_of(text: str) -> bytes:
    """The origin of each character."""
    return text.origins if isinstance(text, ChatText) else bytes(len(text))


def concat(parts: Iterable[str]) -> str:
    """`"".join(parts)`."""
    listed = list(parts)
    take(sum(map(len, listed)))
    text = "".join(listed)
    if not any(isinstance(part, ChatText) for part in listed):
        return text
    return with_origins(text, b"".join(map(origins_of, listed)))


# --- what a template may call on a string, named and called as in `str` ---------------------------


def _strip(text: str, chars: str | None = None) -> str:
    return _lstrip(_rstrip(text, chars), chars)


def _lstrip(text: str, chars: str | None = None) -> str:
    take(len(text))
    return text[len(text) - len(plain(text).lstrip(chars)) :]


def _rstrip(text: str, chars: str | None = None) -> str:
    take(len(text))
    return text[: len(plain(text).rstrip(chars))]


def _removeprefix(text: str, prefix: str) -> str:
    take(len(text))
    return text[len(prefix) :] if text.startswith(prefix) else text


def _removesuffix(text: str, suffix: str) -> str:
    take(len(text))
    return text[: len(text) - len(suffix)] if suffix and text.endswith(suffix) else text


def _pieces(text: str, pieces: list[str]) -> list[str]:
    """The pieces, which stand in `text` one after another, as parts of it."""
    take(len(text) + PIECE * len(pieces))
    if not isinstance(text, ChatText):
        return pieces
    at, found = 0, []
    for piece in pieces:
        at = text.find(piece, at)
        found.append(text[at : at + len(piece)])
        at += len(piece)
    return found


def _split(text: str, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
    return _cut(text, sep, maxsplit, str.split)


def _rsplit(text: str, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
    return _cut(text, sep, maxsplit, str.rsplit)


def _cut(
    text: str, sep: str | None, maxsplit: SupportsIndex, cut: Callable[..., list[str]]
) -> list[str]:
    if sep:  # known before the pieces are made, for there may be as many as characters
        take(PIECE * text.count(sep))
    pieces = cut(plain(text), sep, maxsplit)
    if sep is None or not isinstance(text, ChatText):
        return _pieces(text, pieces)
    at, found = 0, []
    for piece in pieces:  # exact also where a piece is empty
        found.append(text[at : at + len(piece)])
        at += len(piece) + len(sep)
    return found


def _splitlines(text: str, keepends: bool = False) -> list[str]:
    take(PIECE * text.count("\n"))
    lines = _pieces(text, plain(text).splitlines(True))
    return lines if keepends else [line[: len(line.splitlines()[0])] for line in lines]


def _partition(text: str, sep: str) -> tuple[str, str, str]:
    take(len(text))
    head, middle, _ = plain(text).partition(sep)
    a, b = len(head), len(head) + len(middle)
    return text[:a], text[a:b], text[b:]


def _rpartition(text: str, sep: str) -> tuple[str, str, str]:
    take(len(text))
    head, middle, _ = plain(text).rpartition(sep)
    a, b = len(head), len(head) + len(middle)
    return text[:a], text[a:b], text[b:]


def _replace(text: str, old: str, new: str, count: SupportsIndex = -1) -> str:
    times = text.count(old)
    if count.__index__() >= 0:
        times = min(times, count.__index__())
    take(len(text) + times * (PIECE + max(0, len(new) - len(old))))
    if not (isinstance(text, ChatText) or isinstance(new, ChatText)) or not times:
        return plain(text).replace(old, new, count) if times else text
    if not old:  # between all characters: no template builds its tokens so
        return plain(text).replace(old, plain(new), count)
    pieces = _cut(text, old, count, str.split)
    if not any(origin & END for origin in origins_of(text)):
        return _join(new, pieces)
    # What takes the place of a message's end is its end.
    ending = with_origins(plain(new), bytes(origin | END for origin in origins_of(new)))
    found, at = [pieces[0]], len(pieces[0])
    for piece in pieces[1:]:
        ends = any(origin & END for origin in origins_of(text)[at : at + len(old)])
        found += (ending if ends else new, piece)
        at += len(old) + len(piece)
    return concat(found)


def _join(text: str, parts: Iterable[Any]) -> str:
    if isinstance(parts, str) and not isinstance(parts, ChatText) and not text:
        return plain(parts)
    listed = list(parts)
    for part in listed:
        if not isinstance(part, str):
            raise TypeError(f"a string cannot be joined with {type(part).__name__}")
    take(sum(map(len, listed)) + len(text) * len(listed) + PIECE * len(listed))
    if not isinstance(text, ChatText) and not any(isinstance(part, ChatText) for part in listed):
        return plain(text).join(listed)
    between: list[str] = []
    for part in listed:
        between += (part, text)
    return concat(between[:-1])


def _changed(method: Callable[[str], str]) -> Callable[[str], str]:
    """A method that changes characters in their places, as all but a few letters let it."""

    def change(text: str) -> str:
        take(len(text))
        result = method(plain(text))
        if isinstance(text, ChatText) and len(result) == len(text):
            return with_origins(result, text.origins)
        return result

    return change


def _padded(method: Callable[..., str]) -> Callable[..., str]:
    def pad(text: str, width: SupportsIndex, *fill: str) -> str:
        take(len(text) + max(0, width.__index__()))
        result = method(plain(text), width, *fill)
        return result if len(result) > len(text) else text

    return pad


def repeat(text: str, times: int) -> str:
    """`text * times`."""
    take(len(text) * max(0, times))
    return with_origins(plain(text) * times, origins_of(text) * times)


TEXT_METHODS: Final[dict[str, Callable[..., Any]]] = {
    "strip": _strip,
    "lstrip": _lstrip,
    "rstrip": _rstrip,
    "removeprefix": _removeprefix,
    "removesuffix": _removesuffix,
    "split": _split,
    "rsplit": _rsplit,
    "splitlines": _splitlines,
    "partition": _partition,
    "rpartition": _rpartition,
    "replace": _replace,
    "join": _join,
    **{
        name: _changed(getattr(str, name))
        for name in ("upper", "lower", "title", "capitalize", "swapcase", "casefold")
    },
    **{name: _padded(getattr(str, name)) for name in ("center", "ljust", "rjust", "zfill")},
}
"""Methods that give text, each with its origins."""

TEXT_QUESTIONS: Final = frozenset(
    name
    for name in dir(str)
    if name.startswith("is") or name in {"startswith", "endswith", "find", "rfind", "count"}
) | {"index", "rindex"}
"""Methods that tell something of a text, in a time that grows with its length."""
