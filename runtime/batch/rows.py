"""The rows of an input file: read one by one, named, and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Final

from ..server.errors import ApiError
from ..server.json_body import parse_json
from .bodies import ROUTES

MAX_ID_CHARACTERS: Final = 512

_FIELDS = ("custom_id", "method", "url", "body")
_NAME_BYTES = 12
_PIECE_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the input that is not blank; `line` is None where it is too long.

    `name` follows from the job, the number and the text of the line: what has this name in an
    output is the answer to this row.
    """

    number: int
    name: str
    line: bytes | None


@dataclass(frozen=True, slots=True)
class RowRequest:
    """What a row asks for."""

    custom_id: str
    url: str
    body: dict[str, Any]


class RowError(Exception):
    """A row that is no request; `custom_id` is known unless that is what is wrong."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        self.code = code
        self.message = message
        self.custom_id = custom_id
        super().__init__(message)


def read_rows(file: BinaryIO, job_key: bytes, max_bytes: int) -> Iterator[Row]:
    """The rows of a file, of which never more than one is in memory."""
    number = 0
    while line := file.readline(max_bytes + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        is_long = len(line) > max_bytes and not line.endswith(b"\n")
        text = line.strip()
        name = hashlib.blake2b(number.to_bytes(8), key=job_key, digest_size=_NAME_BYTES)
        name.update(text)
        if is_long:
            while rest := file.readline(_PIECE_BYTES):
                name.update(rest)
                if rest.endswith(b"\n"):
                    break
        if text or is_long:
            yield Row(number, name.hexdigest(), None if is_long else text)


class RowReader:
    """Checks rows in their order: each `custom_id` may occur once."""

    def __init__(self, max_bytes: int, max_integers: int) -> None:
        self._max_bytes = max_bytes
        self._max_integers: Mapping[str, int] = {"body": max_integers}
        # Numbers of 64 bits: a million rows take about 70 MB.
        self._seen: set[int] = set()

    def read(self, row: Row) -> RowRequest:
        """What a row asks for. Raises RowError."""
        if row.line is None:
            raise RowError("line_too_long", f"the line is longer than {self._max_bytes} bytes")
        try:
            fields = parse_json(row.line, self._max_integers)
        except ApiError as error:
            reason = error.message.replace("the body", "the line", 1)
            raise RowError(error.code or "invalid_json", reason) from None
        custom_id = fields.get("custom_id")
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_CHARACTERS:
            raise RowError(
                "invalid_custom_id",
                f"custom_id must be text of 1 to {MAX_ID_CHARACTERS} characters",
            )
        digest = hashlib.blake2b(custom_id.encode(), digest_size=8).digest()
        if (key := int.from_bytes(digest)) in self._seen:
            raise RowError(
                "duplicate_custom_id", "an earlier row has the same custom_id", custom_id
            )
        self._seen.add(key)
        return _checked(fields, custom_id)


def _checked(fields: Mapping[str, Any], custom_id: str) -> RowRequest:
    for name in fields:
        if name not in _FIELDS:
            reason = f"{name[:80]} is not a field of a row, which has {', '.join(_FIELDS)}"
            raise RowError("unknown_field", reason, custom_id)
    if fields.get("method") != "POST":
        raise RowError("invalid_method", "method must be POST", custom_id)
    if (url := fields.get("url")) not in ROUTES:
        reason = f"url must be {' or '.join(ROUTES)}"
        raise RowError("invalid_url", reason, custom_id)
    if not isinstance(body := fields.get("body"), dict):
        raise RowError("invalid_body", "body must be an object", custom_id)
    return RowRequest(custom_id, url, body)
