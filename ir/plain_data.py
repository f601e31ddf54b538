"""Dataclasses as plain JSON and back, as their type hints say."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def encode(value: Any) -> Any:
    """Plain JSON of a value: dataclasses become mappings of their fields, tuples lists.

    A dataclass with a method `plain` says itself what it becomes.
    """
    if dataclasses.is_dataclass(value):
        if hasattr(value, "plain"):
            return encode(value.plain())
        return {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value


def unknown_keys(kind: Any, value: Any, where: str = "") -> Iterator[str]:
    """Keys, anywhere in it, that are no fields: "limits.speed"."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        hints = _field_types(kind)
        for key, item in value.items():
            if key in hints:
                yield from unknown_keys(hints[key], item, f"{where}{key}.")
            else:
                yield f"{where}{key}"
    elif get_origin(kind) in (Union, types.UnionType) and value is not None:
        inner, rest = _member(kind, value)
        yield from unknown_keys(inner, rest, where)
    elif get_origin(kind) is tuple and isinstance(value, list):
        for item in value:
            yield from unknown_keys(get_args(kind)[0], item, where)
    elif get_origin(kind) is Mapping and isinstance(value, dict):
        for key, item in value.items():
            yield from unknown_keys(get_args(kind)[1], item, f"{where}{key}.")


def decode(kind: Any, value: Any, where: str) -> Any:
    """Turns plain JSON into `kind`, as its type hints say; TypeError names the first misfit.

    A dataclass with a method `from_plain` is made of the fields that it gives.
    """
    origin, args = get_origin(kind), get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _decode_dataclass(kind, value, where)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        inner, rest = _member(kind, value)
        return decode(inner, rest, where)
    if origin is Literal and value in args:
        return value
    if origin is tuple and isinstance(value, list):
        return tuple(decode(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {key: decode(args[1], item, f"{where}.{key}") for key, item in value.items()}
    # `bool` is an `int` to isinstance, and never what a size may be.
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise TypeError(f"{where}: {value!r}, expected {getattr(kind, '__name__', kind)}")


def _member(union: Any, value: Any) -> tuple[Any, Any]:
    """Which type of a union a value is of, and the value without what says so."""
    members = [arg for arg in get_args(union) if arg is not type(None)]
    named = value.get("kind") if isinstance(value, dict) else None
    for member in members if named is not None else ():
        if getattr(member, "kind", None) == named:
            return member, {key: item for key, item in value.items() if key != "kind"}
    return members[0], value


def _decode_dataclass(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"{where}: {value!r}, expected {kind.__name__}")
    value = getattr(kind, "from_plain", dict)(value)
    hints = _field_types(kind)
    if unknown := sorted(set(value) - set(hints)):
        raise TypeError(f"{where}: unknown key {unknown[0]!r}")
    try:
        return kind(**{k: decode(hints[k], v, f"{where}.{k}") for k, v in value.items()})
    except TypeError as error:
        text = str(error)
        raise TypeError(text if text.startswith(where) else f"{where}: {text}") from None


@functools.cache  # hints are text, and evaluating them takes longer than all the rest
def _field_types(kind: type) -> dict[str, Any]:
    """The types of a dataclass's fields, without what all of its values have in common."""
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
