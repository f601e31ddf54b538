"""Filters and tests of chat templates: jinja's own, bounded, and with the origins of text."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import jinja2
import jinja2.filters
import jinja2.tests

from .template_format import as_text, percent
from .template_meter import PIECE, TooMuch, check_number, counted, take, tick, weigh
from .template_operators import add
from .template_text import TEXT_METHODS, ChatText, concat, with_origins

_MAX_INDENT: Final = 64
_MAX_FIELDS: Final = 1 << 14  # what a width or a count may be
_MAX_SLOW: Final = 1 << 14  # characters for filters whose time grows faster than their input

_Filter = Callable[..., Any]


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' `tojson` writes it."""
    width = len(indent) if isinstance(indent, str) else indent or 0
    between = sum(map(len, separators or ()))
    if max(width, between) > _MAX_INDENT:
        raise TooMuch(f"it indents by more than {_MAX_INDENT} characters")
    num_parts, depth = weigh(value)
    take(num_parts * (between + depth * max(0, width)))
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    take(len(text))
    return text


def _method(name: str) -> _Filter:
    method = TEXT_METHODS[name]

    def apply(value: Any, *args: Any, **kwargs: Any) -> Any:
        return method(as_text(value), *args, **kwargs)

    return apply


def _trim(value: Any, chars: str | None = None) -> Any:
    return TEXT_METHODS["strip"](as_text(value), chars)


def _replace(s: Any, old: Any, new: Any, count: int | None = None) -> Any:
    times = -1 if count is None else count
    return TEXT_METHODS["replace"](as_text(s), as_text(old), as_text(new), times)


def _title(value: Any) -> str:
    text = as_text(value)
    take(len(text))
    result = jinja2.filters.do_title(str.__str__(text))
    if isinstance(text, ChatText) and len(text) == len(result):
        return with_origins(result, text.origins)
    return result


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise jinja2.exceptions.FilterArgumentError(
            "can't handle positional and keyword arguments at the same time"
        )
    return percent(as_text(value), kwargs or args)


@jinja2.pass_environment
def _join(
    environment: jinja2.Environment,
    value: Iterable[Any],
    d: Any = "",
    attribute: str | int | None = None,
) -> Any:
    if attribute is not None:
        get = jinja2.filters.make_attrgetter(environment, attribute)
        value = map(get, value)
    return TEXT_METHODS["join"](as_text(d), [as_text(item) for item in counted(value)])


def _indent(s: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    if not isinstance(width, str) and width > _MAX_FIELDS:
        raise TooMuch(f"it indents by {width} characters")
    space = width if isinstance(width, str) else " " * width
    lines = TEXT_METHODS["splitlines"](concat((as_text(s), "\n")))
    take((len(space) + PIECE) * len(lines))
    parts = [space] if first else []
    for index, line in enumerate(lines):
        if index:
            parts.append("\n")
            if blank or line:
                parts.append(space)
        parts.append(line)
    return concat(parts)


@jinja2.pass_environment
def _truncate(
    environment: jinja2.Environment,
    s: Any,
    length: int = 255,
    killwords: bool = False,
    end: str = "...",
    leeway: int | None = None,
) -> str:
    text = as_text(s)
    kept = environment.policies["truncate.leeway"] if leeway is None else leeway
    if len(text) <= length + kept:
        return text
    head = text[: length - len(end)]
    return concat((head if killwords else TEXT_METHODS["rsplit"](head, " ", 1)[0], end))


def _round(value: Any, precision: int = 0, method: Any = "common") -> float:
    check_number(value)
    if abs(precision) > _MAX_INDENT:
        raise TooMuch(f"it rounds to {precision} digits")
    return jinja2.filters.do_round(value, precision, method)


@jinja2.pass_environment
def _sum(
    environment: jinja2.Environment,
    iterable: Iterable[Any],
    attribute: str | int | None = None,
    start: Any = 0,
) -> Any:
    if attribute is not None:
        iterable = map(jinja2.filters.make_attrgetter(environment, attribute), iterable)
    total = start
    for item in counted(iterable):
        total = add(total, item)
    return total


def _batch(value: Iterable[Any], linecount: int, fill_with: Any = None) -> Any:
    if fill_with is not None and linecount > _MAX_FIELDS:
        raise TooMuch(f"it fills rows of {linecount}")
    return jinja2.filters.do_batch(value, linecount, fill_with)


def _slice(value: Any, slices: int, fill_with: Any = None) -> Any:
    if slices > _MAX_FIELDS:
        raise TooMuch(f"it cuts a list into {slices}")
    return jinja2.filters.sync_do_slice(value, slices, fill_with)


def _list(value: Iterable[Any]) -> list[Any]:
    return list(_paid(value))


def _paid(value: Iterable[Any]) -> Iterable[Any]:
    for item in counted(value):
        take(PIECE // 4)
        yield item


def _safe(value: Any) -> Any:
    """Nothing is escaped here, so nothing has to be kept from it."""
    return as_text(value)


@jinja2.pass_environment
def _attr(environment: jinja2.Environment, obj: Any, name: Any) -> Any:
    if isinstance(obj, str):
        return environment.getattr(obj, str(name))
    return jinja2.filters.do_attr(environment, obj, name)


def _ticking(function: _Filter) -> _Filter:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        tick()
        return function(*args, **kwargs)

    return call


def _weighed(function: _Filter) -> _Filter:
    """For what compares, hashes or writes out its arguments."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        listed = [list(_paid(a)) if hasattr(a, "__next__") else a for a in args]
        for value in itertools.chain(listed, kwargs.values()):
            weigh(value)
        return function(*listed, **kwargs)

    return call


def _short(function: _Filter) -> _Filter:
    """For what takes a time that nobody promises anything of."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for value in itertools.chain(args, kwargs.values()):
            if isinstance(value, str) and len(value) > _MAX_SLOW:
                raise TooMuch(f"a filter takes at most {_MAX_SLOW} characters")
            if isinstance(value, int) and value > _MAX_FIELDS:
                raise TooMuch(f"it asks a filter for {value}")
            if isinstance(value, (list, tuple, Mapping)) and weigh(value)[0] > _MAX_SLOW:
                raise TooMuch(f"a filter takes at most {_MAX_SLOW} values")
        return function(*args, **kwargs)

    return call


_OWN: Final[dict[str, _Filter]] = {
    **{name: _method(name) for name in ("upper", "lower", "capitalize")},
    "attr": _attr,
    "batch": _batch,
    "center": lambda value, width=80: TEXT_METHODS["center"](as_text(value), width),
    "format": _format,
    "indent": _indent,
    "join": _join,
    "list": _list,
    "replace": _replace,
    "round": _round,
    "safe": _safe,
    "slice": _slice,
    "string": as_text,
    "sum": _sum,
    "title": _title,
    "tojson": to_json,
    "trim": _trim,
    "truncate": _truncate,
}
_WEIGHED: Final = ("dictsort", "groupby", "max", "min", "sort", "unique", "urlencode", "wordcount")
_SHORT: Final = (
    "e", "escape", "forceescape", "pprint", "striptags", "urlize", "wordwrap", "xmlattr"
)  # fmt: skip

FILTERS: Final[dict[str, _Filter]] = {
    name: _ticking(function)
    for name, function in {
        **jinja2.filters.FILTERS,
        **{name: _weighed(jinja2.filters.FILTERS[name]) for name in _WEIGHED},
        **{name: _short(jinja2.filters.FILTERS[name]) for name in _SHORT},
        **_OWN,
    }.items()
}

_JINJA_TESTS: Final[dict[str, Any]] = {**jinja2.tests.TESTS}

_COMPARING: Final = frozenset(
    name
    for name, test in _JINJA_TESTS.items()
    if getattr(test, "__module__", "") in ("_operator", "operator")
) | {"in", "lower", "upper"}

TESTS: Final[dict[str, Callable[..., Any]]] = {
    name: _weighed(test) if name in _COMPARING else test for name, test in _JINJA_TESTS.items()
}
