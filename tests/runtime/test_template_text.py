"""Text that knows its origin does what `str` does, and never takes a character for another's."""

from __future__ import annotations

from typing import Any

import jinja2
import jinja2.filters
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from infc.runtime.text.template_filters import FILTERS
from infc.runtime.text.template_format import format_text, percent
from infc.runtime.text.template_sandbox import Sandbox
from infc.runtime.text.template_text import (
    TEXT_METHODS,
    TEXT_QUESTIONS,
    ChatText,
    origins_of,
    plain,
    with_origins,
)

# Capitals and digits are the template's, all else is from outside.
RAW = st.text("ABC19abc \n\t|", max_size=12)


def tagged(text: str) -> str:
    return with_origins(text, bytes(1 if c.isupper() or c.isdigit() else 0 for c in text))


TEXT = RAW.map(tagged)
SHORT = st.text("ABab |", max_size=2).map(tagged)
COUNT = st.integers(-1, 4)
ARGS: dict[str, st.SearchStrategy[tuple[Any, ...]]] = {
    **{name: st.tuples() | st.tuples(SHORT | st.none()) for name in ("strip", "lstrip", "rstrip")},
    **{name: st.tuples(SHORT) for name in ("removeprefix", "removesuffix")},
    **{name: st.tuples(SHORT) for name in ("partition", "rpartition")},
    **{name: st.tuples() | st.tuples(SHORT | st.none(), COUNT) for name in ("split", "rsplit")},
    "splitlines": st.tuples() | st.tuples(st.booleans()),
    "replace": st.tuples(SHORT, SHORT) | st.tuples(SHORT, SHORT, COUNT),
    "join": st.tuples(st.lists(TEXT, max_size=3) | TEXT),
    **{name: st.tuples(st.integers(-1, 16)) for name in ("center", "ljust", "rjust", "zfill")},
}
KEEPS = set(ARGS) - {"center", "ljust", "rjust", "zfill"}


def check(ours: Any, theirs: Any, *, keeps: bool) -> None:
    """The same, and no character is the template's that is not; none is lost where all are kept."""
    if isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            check(one, other, keeps=keeps)
        return
    assert ours == theirs
    if not isinstance(theirs, str):
        return
    for char, origin in zip(plain(ours), origins_of(ours), strict=True):
        own = char.isupper() or char.isdigit()
        assert bool(origin) == own if keeps else not origin or own


@pytest.mark.parametrize("name", ARGS)
@given(data=st.data())
def test_methods(name: str, data: st.DataObject) -> None:
    text, args = data.draw(TEXT), data.draw(ARGS[name])
    bare = [[plain(p) for p in a] if isinstance(a, list) else a for a in args]
    bare = [plain(a) if isinstance(a, str) else a for a in bare]
    try:
        theirs = getattr(plain(text), name)(*bare)
    except ValueError:
        with pytest.raises(ValueError, match="empty separator"):
            TEXT_METHODS[name](text, *args)
        return
    # Between all characters nobody keeps track: whatever comes out is text.
    keeps = name in KEEPS and not (name == "replace" and args[0] == "")
    check(TEXT_METHODS[name](text, *args), theirs, keeps=keeps)


@given(
    text=st.text("\u00df\u0149\u0130\u01c5\ufb03aB\u03a3", max_size=6),
    origins=st.binary(min_size=6, max_size=6),
)
def test_methods_that_change_letters(text: str, origins: bytes) -> None:
    own = bytes(byte & 1 for byte in origins[: len(text)])
    for name in ("upper", "lower", "title", "capitalize", "swapcase", "casefold"):
        result = TEXT_METHODS[name](with_origins(text, own), *())
        assert result == getattr(text, name)()
        assert origins_of(result) == own or not any(origins_of(result))


def test_every_method_of_a_string_is_thought_of() -> None:
    refused = {"encode", "expandtabs", "format", "format_map", "maketrans", "translate"}
    names = {name for name in dir(str) if not name.startswith("_")}
    assert names == set(TEXT_METHODS) | TEXT_QUESTIONS | refused


@given(
    text=TEXT, index=st.integers(-3, 3), stop=st.integers(-3, 9), step=st.sampled_from([1, -1, 2])
)
def test_slices_and_characters(text: str, index: int, stop: int, step: int) -> None:
    check(text[index:stop:step], plain(text)[index:stop:step], keeps=True)
    check(list(text), list(plain(text)), keeps=True)
    if -len(text) <= index < len(text):
        check(text[index], plain(text)[index], keeps=True)
    assert not isinstance(text, ChatText) or str(text) is text


PATTERN = st.lists(
    st.sampled_from(["A", "b", "%s", "%%", "%d", "%5s", "%-4d", "%.2f", "%r", "%", "%(k)s", "%z"]),
    max_size=5,
).map("".join)
VALUE = TEXT | st.integers(-9, 9) | st.floats(-9, 9) | st.none() | st.lists(RAW, max_size=2)


@given(
    pattern=PATTERN,
    values=VALUE | st.lists(VALUE, max_size=4).map(tuple) | st.fixed_dictionaries({"k": VALUE}),
)
@example(pattern="%(k)s%s", values={"k": None})
@example(pattern="%s%(k)s%(k)s", values={"k": "A"})
def test_percent(pattern: str, values: Any) -> None:
    def bare(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(bare(item) for item in value)
        if isinstance(value, dict):
            return {key: bare(item) for key, item in value.items()}
        return plain(value) if isinstance(value, str) else value

    try:
        theirs = pattern % bare(values)
    except (TypeError, ValueError):
        with pytest.raises((TypeError, ValueError)):
            percent(tagged(pattern), values)
        return
    ours = percent(tagged(pattern), values)
    assert ours == theirs


FIELDS = st.lists(
    st.sampled_from(["A", "b", "{}", "{0}", "{1}", "{k}", "{{", "}}", "{:>4}", "{!r}", "{k[0]}"]),
    max_size=5,
).map("".join)


@given(pattern=FIELDS, values=st.lists(VALUE, max_size=3), k=RAW)
def test_format(pattern: str, values: list[Any], k: str) -> None:
    bare = [plain(value) if isinstance(value, str) else value for value in values]
    try:
        theirs = pattern.format(*bare, k=k)
    except (IndexError, ValueError, TypeError):
        # Fields of both kinds in one are refused by Python alone, and only ever make text.
        return
    environment = Sandbox()
    if "{k[0]}" in pattern and not k:
        return  # undefined to a template
    assert format_text(environment, tagged(pattern), values, {"k": k}) == theirs


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("trim", ()), ("trim", ("a",)), ("upper", ()), ("title", ()), ("capitalize", ()),
        ("replace", ("a", "B")), ("replace", ("a", "B", 1)), ("indent", ()), ("indent", (2, True)),
        ("indent", ("> ", True, True)), ("center", (9,)), ("truncate", (5, False, "..", 0)),
        ("truncate", (5, True)), ("list", ()), ("reverse", ()), ("string", ()), ("length", ()),
        ("wordcount", ()), ("first", ()), ("batch", (2,)), ("slice", (2,)), ("join", ("|",)),
    ],
)  # fmt: skip
@given(text=TEXT)
def test_filters(name: str, args: tuple[Any, ...], text: str) -> None:
    """They give what jinja's own give."""
    theirs, ours = jinja2.Environment(), Sandbox()

    def apply(environment: jinja2.Environment, value: str) -> Any:
        result = environment.call_filter(name, value, args)
        return list(result) if hasattr(result, "__next__") else result

    expected = apply(theirs, plain(text))
    got = apply(ours, text)
    if isinstance(expected, jinja2.Undefined):
        assert isinstance(got, jinja2.Undefined)
    else:
        assert got == expected


def test_filters_are_those_of_jinja() -> None:
    assert set(FILTERS) == set(jinja2.filters.FILTERS)
