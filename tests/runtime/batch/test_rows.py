"""Rows of a batch: read one by one, named, and refused with a reason."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest

from infc.runtime.batch.bodies import row_seed
from infc.runtime.batch.rows import Row, RowError, RowReader, read_rows

KEY = b"a job"
GOOD: dict[str, Any] = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/completions",
    "body": {"prompt": "x"},
}


def rows_of(data: bytes, key: bytes = KEY, max_bytes: int = 100) -> list[Row]:
    return list(read_rows(io.BytesIO(data), key, max_bytes))


def read(value: Any, reader: RowReader | None = None) -> RowError:
    line = value if isinstance(value, bytes) else json.dumps(value).encode()
    with pytest.raises(RowError) as error:
        (reader or RowReader(1000, 1000)).read(Row(1, "name", line))
    return error.value


def test_blank_lines_are_no_rows() -> None:
    rows = rows_of(b"\n{}\r\n \n\t\n[1]")
    assert [(row.number, row.line) for row in rows] == [(2, b"{}"), (5, b"[1]")]
    assert rows_of(b"\xef\xbb\xbf{}\n")[0].line == b"{}"


def test_the_name_of_a_row_follows_from_job_number_and_text() -> None:
    rows = rows_of(b"{}\n{}\n[]")
    assert len({row.name for row in rows}) == 3
    assert rows_of(b"{}\n{}\n[]\n") == rows, "whether the last line ends changes nothing"
    assert rows_of(b"{}\n{}\n[]", b"another job")[0].name != rows[0].name


def test_a_long_line_is_no_reason_to_hold_it() -> None:
    data = b"{}\n" + b"x" * 101 + b"\n" + b"y" * 100 + b"\n" + b"z" * (3 << 20)
    rows = rows_of(data)
    assert [row.line for row in rows] == [b"{}", None, b"y" * 100, None]
    assert rows_of(data + b"z")[3].name != rows[3].name
    (row,) = rows_of(b" " * 101 + b"{}\n")
    assert row.line is None, "what begins with more blanks than are read is no blank line"
    with pytest.raises(RowError, match="longer than 1000 bytes"):
        RowReader(1000, 1000).read(rows[1])


@pytest.mark.parametrize(
    ("value", "code", "known"),
    [
        (b"{", "invalid_json", None),
        (b"[]", "invalid_json", None),
        (b'{"custom_id": "a", "custom_id": "b"}', "invalid_json", None),
        (b"\xff", "invalid_json", None),
        ({**GOOD, "custom_id": 7}, "invalid_custom_id", None),
        ({**GOOD, "custom_id": ""}, "invalid_custom_id", None),
        ({**GOOD, "custom_id": "a" * 513}, "invalid_custom_id", None),
        ({**GOOD, "model": "tiny"}, "unknown_field", "a"),
        ({**GOOD, "method": "GET"}, "invalid_method", "a"),
        ({**GOOD, "url": "/v1/embeddings"}, "invalid_url", "a"),
        ({**GOOD, "url": ["/v1/completions"]}, "invalid_url", "a"),
        ({**GOOD, "body": None}, "invalid_body", "a"),
    ],
)
def test_what_is_no_request_is_refused(value: Any, code: str, known: str | None) -> None:
    error = read(value)
    assert (error.code, error.custom_id) == (code, known)


def test_a_custom_id_occurs_once() -> None:
    reader = RowReader(1000, 1000)
    line = json.dumps(GOOD).encode()
    assert reader.read(Row(1, "name", line)).custom_id == "a"
    assert read(GOOD, reader).code == "duplicate_custom_id"
    reader.read(Row(1, "name", json.dumps({**GOOD, "custom_id": "b"}).encode()))


def test_a_seed_follows_from_the_row_and_the_batch() -> None:
    seeds = {row_seed(seed, name) for seed in range(10) for name in "abc"}
    assert len(seeds) == 30
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert row_seed(0, "a") == 5318011831249393047, "a batch may be continued by a later version"
