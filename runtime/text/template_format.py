"""`%` and `format` as templates use them: bounded, and each character with its origin."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, Final

import jinja2.sandbox

from .template_meter import TooMuch, take, weigh
from .template_text import FROM_TEMPLATE, ChatText, concat, from_template, plain

_MAX_DIGITS: Final = 3  # of a width or a precision

_DIRECTIVE: Final = re.compile(
    r"%(?:\((?P<key>[^()]*)\))?(?P<flags>[#0\- +]*)(?P<width>\*|\d*)"
    r"(?:\.(?P<precision>\*|\d*))?[hlL]?(?P<kind>.)",
    re.DOTALL,
)


def as_text(value: Any) -> str:
    """`str(value)`, of a size that is known before."""
    if isinstance(value, str):
        return value
    weigh(value)
    text = str(value)
    take(len(text))
    return text


def _literal(text: str, pattern: str) -> str:
    """A part of a pattern that the template wrote as a whole is the template's."""
    origins = pattern.origins if isinstance(pattern, ChatText) else b""
    return from_template(text) if origins.count(FROM_TEMPLATE) == len(pattern) else text


def percent(pattern: str, values: Any) -> str:
    """`pattern % values`."""
    take(len(pattern))
    args = values if isinstance(values, tuple) else (values,)
    # As Python has it: whatever can be looked into may be left over, but for tuples and strings.
    may_be_left = hasattr(values, "__getitem__") and not isinstance(values, (tuple, str))
    parts, at, used = [], 0, 0
    for match in _DIRECTIVE.finditer(plain(pattern)):
        parts.append(pattern[at : match.start()])
        at = match.end()
        if match["kind"] == "%":
            parts.append(_literal("%", pattern))
            continue
        _check_widths(match["width"], match["precision"] or "")
        if match["key"] is not None:
            if not isinstance(values, Mapping):
                raise TypeError("format requires a mapping")
            value, used = values[match["key"]], len(args)  # no directive without a key may follow
        elif used < len(args):
            value, used = args[used], used + 1
        else:
            raise TypeError("not enough arguments for format string")
        parts.append(_converted(match, value))
    rest = pattern[at:]
    if "%" in rest:
        raise ValueError("incomplete format")
    if used < len(args) and not may_be_left:
        raise TypeError("not all arguments converted during string formatting")
    return concat([*parts, rest])


def _check_widths(*widths: str) -> None:
    for width in widths:
        if width == "*" or len(width) > _MAX_DIGITS:
            raise TooMuch(f"it asks for a field of {width} characters")


def _converted(match: re.Match[str], value: Any) -> str:
    if match["kind"] == "s" and not match["width"] and match["precision"] is None:
        return as_text(value)
    weigh(value)
    text = f"%{match['flags']}{match['width']}"
    if match["precision"] is not None:
        text += f".{match['precision']}"
    result: str = (text + match["kind"]) % (value,)
    take(len(result))
    return result


class _Formatter(jinja2.sandbox.SandboxedFormatter):
    """Looks up fields within the sandbox, and writes one that nothing is said of as it is."""

    def format_field(self, value: Any, format_spec: str) -> Any:
        if not format_spec:
            return as_text(value)
        _check_widths(*re.findall(r"\d+", format_spec))
        weigh(value)
        text = format(plain(value) if isinstance(value, str) else value, plain(format_spec))
        take(len(text))
        return text

    def convert_field(self, value: Any, conversion: Any) -> Any:
        weigh(value)
        return super().convert_field(value, conversion)


def format_text(
    environment: jinja2.Environment, pattern: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> str:
    """`pattern.format(*args, **kwargs)`."""
    take(len(pattern))
    formatter, parts, number = _Formatter(environment), [], 0
    for literal, field, spec, conversion in string.Formatter().parse(plain(pattern)):
        parts.append(_literal(literal, pattern))
        if field is None:
            continue
        if spec and "{" in spec:
            raise ValueError("nested formats are not allowed in chat templates")
        if not field or field[0] in ".[":
            field, number = f"{number}{field}", number + 1
        value, _ = formatter.get_field(field, args, kwargs)
        parts.append(formatter.format_field(formatter.convert_field(value, conversion), spec or ""))
    return concat(parts)
