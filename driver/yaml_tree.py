"""YAML as plain data, with the line of each key for error messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml
from yaml.constructor import SafeConstructor
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from ..ir.errors import RecipeError

KeyPath = tuple[str | int, ...]
"""Where a value lies: keys of mappings, indices of lists."""

_MAX_BYTES = 1 << 20
_MAX_NODES = 20_000  # counted after aliases are followed: a page of anchors may stand for millions
_MAX_DEPTH = 32
_SCALARS = frozenset(
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null")
)
_NOTHING: Final[Mapping[tuple[str, ...], str]] = {}


@dataclass(slots=True)
class YamlTree:
    """Plain data, and for each path in it the place that set it, as `FILE:LINE` or an option."""

    data: dict[str, Any]
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str | None:
        """The place of the innermost part of `path` that has one."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return None

    def set_from_text(
        self, assignment: str, short_for: Mapping[tuple[str, ...], str] = _NOTHING
    ) -> None:
        """Applies `a.b=c`, as in `--set`; the value is read as YAML.

        Where `a` is a text that `short_for` knows, that text becomes the value of the key which it
        is short for, and stays beside `b`; RecipeError for another text.
        """
        option = f"--set {assignment}"
        dotted, equals, text = assignment.partition("=")
        path = tuple(dotted.strip().split("."))
        if not equals or not all(path):
            raise RecipeError("expected KEY=VALUE", where=option, hint="--set a.b=c")
        value = _parse(text, option, one_line=True)
        inner = self.data
        for depth, key in enumerate(path[:-1], 1):
            below = inner.get(key)
            if isinstance(below, str):
                name = short_for.get(path[:depth])
                if name is None:
                    above = ".".join(path[:depth])
                    raise RecipeError(f"{above} is {below!r}, which has no keys", where=option)
                below = inner[key] = {name: below}
            elif not isinstance(below, dict):
                below = inner[key] = {}
            inner = below
        inner[path[-1]] = value.data.get("")
        for old in [known for known in self.places if known[: len(path)] == path]:
            del self.places[old]
        self.places[path] = option


def read_yaml(path: Path) -> YamlTree:
    """Reads a YAML file that holds one mapping; raises RecipeError with file and line."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)  # a device has no size, and may have no end
        if len(data) > _MAX_BYTES:
            raise RecipeError(f"larger than {_MAX_BYTES >> 20} MiB", where=str(path))
        text = data.decode("utf-8")
    except FileNotFoundError:
        raise RecipeError("no such file", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"not UTF-8 text (byte {error.start})", where=str(path)) from None
    except OSError as error:
        raise RecipeError(f"cannot be read: {error.strerror}", where=str(path)) from None
    return _parse(text, str(path))


def _parse(text: str, source: str, *, one_line: bool = False) -> YamlTree:
    """Builds a tree; the value of `one_line` text is kept under the key ''."""
    builder = _Builder(source, one_line)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line if error.problem_mark else 0
        problem = error.problem or error.context or "malformed"
        raise RecipeError(f"not valid YAML: {problem}", where=builder.at(line)) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecipeError(f"not valid YAML: {first}", where=source) from None
    value = None if node is None else builder.build(node, (), 0)
    if one_line:
        return YamlTree({"": value}, builder.places)
    if value is None:
        value = {}
    if not isinstance(value, dict):
        raise RecipeError("a recipe is a mapping of keys to values", where=builder.at(0))
    builder.places[()] = source
    return YamlTree(value, builder.places)


class _Builder:
    """Turns composed nodes into plain data, within limits, noting the line of every key."""

    def __init__(self, source: str, one_line: bool) -> None:
        self.places: dict[KeyPath, str] = {}
        self._source, self._one_line, self._count = source, one_line, 0
        self._scalars = SafeConstructor()

    def at(self, line: int) -> str:
        """`FILE:LINE`, counted from 1."""
        return self._source if self._one_line else f"{self._source}:{line + 1}"

    def build(self, node: Node, path: KeyPath, depth: int) -> Any:
        line = node.start_mark.line
        self._count += 1
        if self._count > _MAX_NODES or depth > _MAX_DEPTH:
            raise RecipeError(
                "too large or too deep when aliases are expanded", where=self.at(line)
            )
        if isinstance(node, MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, SequenceNode):
            for index, item in enumerate(node.value):
                self.places.setdefault((*path, index), self.at(item.start_mark.line))
            items = enumerate(node.value)
            return [self.build(item, (*path, index), depth + 1) for index, item in items]
        assert isinstance(node, ScalarNode)
        if node.tag not in _SCALARS:
            kind = node.tag.rpartition(":")[2]
            raise RecipeError(f"values of type {kind!r} are not supported", where=self.at(line))
        try:
            return self._scalars.construct_object(node)
        except (ValueError, yaml.YAMLError):
            raise RecipeError(f"cannot read {node.value!r}", where=self.at(line)) from None

    def _mapping(self, node: MappingNode, path: KeyPath, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = self.at(key_node.start_mark.line)
            key = self.build(key_node, path, depth + 1)
            if not isinstance(key, str):
                raise RecipeError(f"the key {key!r} is not text", where=place, hint="quote it")
            if key in result:
                raise RecipeError(f"duplicate key {key!r}", where=place)
            self.places[(*path, key)] = place
            result[key] = self.build(value_node, (*path, key), depth + 1)
        return result
