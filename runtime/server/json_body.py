"""The JSON of a request: UTF-8, strict, and refused before it has made too many values."""

from __future__ import annotations

import json
import json.decoder
import json.scanner
import re
from collections import Counter
from collections.abc import Callable, Mapping
from json.decoder import scanstring  # type: ignore[attr-defined]
from typing import Any, NoReturn

from .errors import ApiError

SMALL_BYTES = 1 << 16
"""A body of at most so many bytes is parsed within a few milliseconds, whatever it holds."""

MAX_VALUES = 1 << 16
"""Values that one field of a larger body may hold, lists of integers apart."""

_MAX_FIELDS = 256
_MAX_RUN = 1 << 18  # characters that are handed to the decoder in C: some milliseconds
_FIRST_RUN = 1 << 12  # of a string: most are shorter, and each run is copied

_NAME = re.compile(r'"([^"]{1,80})"\s*:\s*\Z')
_INTEGERS = re.compile(r"[0-9, \t\n\r]+")
_HALF_OF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")

_Scan = Callable[[str, int], tuple[Any, int]]


def parse_json(
    body: bytes | bytearray, max_integers: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """The object that a body holds: UTF-8, no NaN, no key twice, no half of a character.

    A field whose name is in `max_integers` may hold so many integers in lists; any other,
    `MAX_VALUES`. Raises ApiError.
    """
    try:
        text = body.decode("utf-8")
        if len(body) <= SMALL_BYTES:
            value = json.loads(text, parse_constant=_no_number, object_pairs_hook=_unique)
        else:
            value = _BoundedDecoder(max_integers or {}).decode(text)
        if _HALF_OF_A_PAIR.search(text):  # which no tokenizer takes
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise _not_json("it is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise _not_json(f"byte {error.start} is not UTF-8") from None
    except UnicodeEncodeError:
        raise _not_json("it holds half of a surrogate pair") from None
    except ValueError as error:  # also of an integer with thousands of digits
        raise _not_json(str(error)) from None
    if not isinstance(value, dict):
        raise _not_json("it is not an object")
    return value


class _BoundedDecoder(json.JSONDecoder):
    """Stops at a bound instead of building millions of values that are refused afterwards.

    It takes the library's decoder in Python, not the one in C: that one holds the interpreter's
    lock until it has read everything, and meanwhile no other thread can run.
    """

    def __init__(self, max_integers: Mapping[str, int]) -> None:
        super().__init__(parse_constant=_no_number, object_pairs_hook=_unique)
        self._max_integers = max_integers
        self._inside = False  # the object that is the whole body
        self._num_fields = 0
        self._name = ""
        self._num_values = self._num_integers = 0
        self.parse_array = self._parse_array
        self.parse_object = self._parse_object
        self.parse_string = _parse_string
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]

    def _parse_array(self, place: tuple[str, int], scan_once: _Scan) -> tuple[list[Any], int]:
        self._inside = True
        if (found := self._integers(*place)) is not None:
            return found
        result: tuple[list[Any], int] = json.decoder.JSONArray(  # type: ignore[attr-defined]
            place, self._counted(scan_once)
        )
        return result

    def _integers(self, text: str, begin: int) -> tuple[list[Any], int] | None:
        """A list of integers, as prompts are, the quick way; None for any other."""
        values: list[Any] = []
        before, whole = self._num_integers, False
        while not whole:
            run = _INTEGERS.match(text, begin, begin + _MAX_RUN)
            end = begin if run is None else run.end()
            whole = text.startswith("]", end)
            if not whole:
                end = text.rfind(",", begin, end) if end == begin + _MAX_RUN else -1
            try:
                piece = json.loads(f"[{text[begin:end]}]") if end > begin else []
            except ValueError:
                piece = []
            if not piece:  # the slow way says what is wrong, and where
                self._num_integers = before
                return None
            self._num_integers += len(piece)
            self._check(self._num_integers, self._max_integers.get(self._name, MAX_VALUES))
            values += piece
            begin = end + 1
        return values, begin

    def _parse_object(
        self, place: tuple[str, int], strict: bool, scan_once: _Scan, *hooks: Any
    ) -> tuple[Any, int]:
        scan = self._counted(scan_once) if self._inside else self._field(scan_once)
        self._inside = True
        result: tuple[Any, int] = json.decoder.JSONObject(  # type: ignore[attr-defined]
            place, strict, scan, *hooks
        )
        return result

    def _field(self, scan_once: _Scan) -> _Scan:
        """Reads the value of a field of the body, and counts anew for each."""

        def scan(text: str, index: int) -> tuple[Any, int]:
            self._num_fields += 1
            if self._num_fields > _MAX_FIELDS:
                raise _too_many("the body", _MAX_FIELDS, "fields")
            name = _NAME.search(text[max(0, index - 100) : index])
            self._name = name[1] if name else ""
            self._num_values = self._num_integers = 0
            return scan_once(text, index)

        return scan

    def _counted(self, scan_once: _Scan) -> _Scan:
        def scan(text: str, index: int) -> tuple[Any, int]:
            self._num_values += 1
            self._check(self._num_values, MAX_VALUES)
            return scan_once(text, index)

        return scan

    def _check(self, count: int, most: int) -> None:
        if count > most:
            raise _too_many(self._name or "the body", most, "values", self._name or None)


def _parse_string(text: str, begin: int, strict: bool = True) -> tuple[str, int]:
    """As the decoder in C, but in runs, between which other threads can have the lock."""
    found: tuple[str, int]
    parts, place, length = [], begin, _FIRST_RUN
    try:
        while len(text) - place > length:
            cut = _between_escapes(text, place, place + length)
            part, end = scanstring(text[place:cut] + '"', 0, strict)
            parts.append(part)
            if end <= cut - place:  # its own quote, not the one that was added
                return "".join(parts), place + end
            place, length = cut, min(2 * length, _MAX_RUN)
        found = scanstring(text, place, strict)
    except ValueError:
        found = scanstring(text, begin, strict)  # fails likewise, and says where in the body
        parts = []
    return "".join([*parts, found[0]]), found[1]


def _between_escapes(text: str, begin: int, cut: int) -> int:
    """`cut`, or the place before it where an escape or pair of surrogates begins that it splits."""
    start = text.rfind("\\", max(begin, cut - 6), cut)
    if start < 0:
        return cut
    before = text[begin : start + 1]
    if (len(before) - len(before.rstrip("\\"))) % 2 == 0:
        return cut  # an escaped backslash
    is_unicode = text[start + 1] == "u"
    if start + (6 if is_unicode else 2) > cut:
        return _between_escapes(text, begin, start)
    is_high = text[start + 2 : start + 4].lower() in ("d8", "d9", "da", "db")
    return start if is_unicode and is_high and start + 6 == cut else cut


def _too_many(what: str, most: int, unit: str, param: str | None = None) -> ApiError:
    return ApiError(400, f"{what} holds more than {most} {unit}", param=param, code="too_long")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise ValueError(f"the key {twice[:80]!r} occurs twice")
    return result


def _not_json(reason: str) -> ApiError:
    return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")
