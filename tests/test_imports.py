"""Which modules import which: no circle, neither of modules nor of folders."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("codegen", "driver", "frontend", "ir", "passes", "runtime")
Graph = Mapping[str, frozenset[str]]


@cache
def imports() -> Graph:
    """What each module imports of infc, also inside of functions, but not for types alone."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
    }
    return {
        name: frozenset(_imported(name, path, files)) - {name}
        for name, path in sorted(files.items())
    }


def _imported(name: str, path: Path, files: Mapping[str, Path]) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in _statements(ast.parse(path.read_text(encoding="utf-8")).body):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        parts = package.split(".")
        base = parts[: len(parts) - node.level + 1]
        module = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            inner = f"{module}.{alias.name}" if module else alias.name
            if inner in files:
                yield inner
            elif module in files:
                yield module


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from _statements(node.orelse)
            continue
        yield node
        for field in ("body", "orelse", "finalbody", "handlers", "cases"):
            inner = getattr(node, field, None)
            if isinstance(inner, list):
                for one in inner:
                    yield from _statements(one.body if hasattr(one, "body") else [one])
                    if isinstance(one, ast.stmt):
                        yield one


def circles(graph: Graph) -> list[list[str]]:
    """The strongly connected parts of more than one node (Tarjan, 1972), each sorted."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            part = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(part) > 1:
                found.append(sorted(part))

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


def folders(graph: Graph) -> Graph:
    """The same between folders."""
    places = {name: name.rpartition(".")[0] for name in graph}
    merged: dict[str, set[str]] = {place: set() for place in places.values()}
    for name, others in graph.items():
        merged[places[name]] |= {places[other] for other in others} - {places[name]}
    return {place: frozenset(others) for place, others in merged.items()}


def test_circles_are_found() -> None:
    graph = {"a": "b", "b": "ca", "c": "d", "d": "e", "e": "c", "f": "a"}
    assert circles({name: frozenset(others) for name, others in graph.items()}) == [
        ["c", "d", "e"],
        ["a", "b"],
    ]


def test_no_module_imports_itself_by_a_detour() -> None:
    assert circles(imports()) == []


def test_no_folder_imports_one_beside_it_by_a_detour() -> None:
    """A folder and those inside of it belong together."""
    apart = {
        place: frozenset(one for one in others if not _is_inside(place, one))
        for place, others in folders(imports()).items()
    }
    assert circles(apart) == []


def _is_inside(a: str, b: str) -> bool:
    return a.startswith(f"{b}.") or b.startswith(f"{a}.")
