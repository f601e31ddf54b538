"""JSON of requests and answers: as the library reads and writes it, only bounded and in pieces."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.runtime.server import json_body
from infc.runtime.server.encoding import Joined, Shared, encode, encode_in_pieces, in_chunks
from infc.runtime.server.errors import ApiError
from infc.runtime.server.json_body import MAX_VALUES, SMALL_BYTES, parse_json

PAD = b" " * SMALL_BYTES
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
)  # fmt: skip


def refused(body: bytes, **max_integers: int) -> ApiError:
    """The refusal of a body that must not pass."""
    with pytest.raises(ApiError) as caught:
        parse_json(body, max_integers)
    assert caught.value.status == 400
    return caught.value


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), VALUES), st.booleans())
def test_large_and_small_bodies_are_read_alike(value: dict[str, Any], ascii_only: bool) -> None:
    body = json.dumps(value, ensure_ascii=ascii_only).encode()
    for padding in (b"", PAD):
        assert parse_json(body + padding) == value


@pytest.mark.parametrize(
    "text",
    [
        '{"a":[1,2,]}',
        '{"a":[01]}',
        '{"a":[1 2]}',
        '{"a":[,1]}',
        '{"a":[1',
        '{"a":[1,2',
        '{"a":1,"a":2}',
        '{"a":{"b":1,"b":2}}',
        '{"a":NaN}',
        '{"a":"\\ud83d"}',
        "[1,2]",
    ],
)
def test_large_and_small_bodies_are_refused_alike(text: str) -> None:
    small, large = refused(text.encode()), refused(text.encode() + PAD)
    assert small.code == large.code == "invalid_json"


def test_integers_may_be_many_where_that_is_said() -> None:
    ids = list(range(200_000))
    body = json.dumps({"prompt": [ids, ids[:5]], "n": 1}).encode()
    assert parse_json(body, {"prompt": 200_005}) == {"prompt": [ids, ids[:5]], "n": 1}
    assert refused(body, prompt=200_004).param == "prompt"
    assert refused(body).param == "prompt"


@pytest.mark.parametrize("unit", ["[]", "{}", '""', "1.5", "[[1]]", '{"a":1}'])
def test_no_field_holds_too_many_values(unit: str) -> None:
    for count, is_bad in ((MAX_VALUES // 4, False), (MAX_VALUES + 1, True)):
        body = f'{{"x":[1],"field":[{",".join([unit] * count)}]}}'.encode()
        assert len(body) > SMALL_BYTES // 2
        if is_bad:
            error = refused(body)
            assert (error.param, error.code) == ("field", "too_long")
        else:
            parse_json(body)


def test_a_body_has_not_too_many_fields() -> None:
    body = ",".join(f'"field_{index}":1' for index in range(100_000))
    assert "256 fields" in refused(f"{{{body}}}".encode()).message


LISTS = st.lists(st.dictionaries(st.text(), st.integers()), max_size=200)


@given(st.lists(LISTS, min_size=1, max_size=3), LISTS, st.text())
def test_answers_in_pieces_are_the_answers(
    own: list[list[Any]], common: list[Any], text: str
) -> None:
    shared = Shared(common)
    choices = [
        {
            "index": i,
            "text": text,
            "logprobs": {"a": Joined((shared, part)), "b": None},
            "c": shared,
        }
        for i, part in enumerate(own)
    ]
    plain = [
        {"index": i, "text": text, "logprobs": {"a": [*common, *part], "b": None}, "c": common}
        for i, part in enumerate(own)
    ]
    pieces = encode_in_pieces({"id": "é"}, choices, usage={"n": 1})
    assert json.loads(b"".join(pieces)) == {"id": "é", "choices": plain, "usage": {"n": 1}}
    assert b"".join(in_chunks(pieces)) == b"".join(pieces)
    assert b"".join(pieces).isascii()
    head = encode_in_pieces({"id": 1}, choices)
    assert json.loads(b"".join(head)) == json.loads(encode({"id": 1, "choices": plain}))


def test_chunks_are_neither_small_nor_large() -> None:
    pieces = [b"a" * 10] * 20_000 + [b"b" * 300_000] + [b"c"]
    chunks = list(in_chunks(pieces))
    assert b"".join(chunks) == b"".join(pieces)
    assert all(1 << 16 <= len(chunk) < 1 << 17 for chunk in chunks[:-1])


@given(
    st.lists(
        st.sampled_from(
            [
                "\\n",
                "a",
                "\\ud83d",
                "\\ude00",
                "\\\\",
                '\\"',
                "é",
                "\\u00e9",
                "xyz" * 3,
                "\\",
                "u",
                '"',
            ]
        ),
        max_size=60,
    ),
    st.integers(16, 40),
)
def test_strings_are_read_in_runs_as_they_are_whole(units: list[str], run: int) -> None:
    """No run ends inside an escape or a pair of surrogates, and errors say the same."""
    text = '"' + "".join(units) + '"' + "z" * 50

    def outcome(read: Callable[[str, int, bool], tuple[str, int]]) -> object:
        try:
            return read(text, 1, True)
        except ValueError as error:
            return str(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_body, "_FIRST_RUN", run)
        patch.setattr(json_body, "_MAX_RUN", run)
        assert outcome(json_body._parse_string) == outcome(json.decoder.scanstring)  # type: ignore[attr-defined]
