"""Kernels that plug-ins bring: a lowering each, and the headers that it calls into."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...ir.errors import UsageError
from ...ir.plugins import load_plugins
from ...ir.program import Node
from ...ir.types import TensorType
from .buffers import Buffer
from .calls import Arg
from .emitter import Emitter, Lowering, pointer
from .lower import LOWERINGS

FOLDER = "extensions"
"""Where headers of plug-ins lie in an artifact, beside the kernels."""


@dataclass(frozen=True, slots=True)
class Extension:
    """How an op of a plug-in becomes calls, and the headers that they need."""

    lowering: Lowering
    headers: tuple[Path, ...] = ()


_EXTENSIONS: dict[str, Extension] = {}


def register_kernel(op: str, lowering: Lowering, headers: Sequence[Path] = ()) -> None:
    """Let the cpp backend run the op of that name.

    `lowering(emitter, node)` appends calls (see `Emitter`); `row_kernel` makes one for functions
    over rows. `headers` are copied into each artifact that needs them, and included as they are
    named. A second registration takes the place of the first; UsageError for an op of infc's own,
    and for headers that are missing or oddly named.
    """
    if op in LOWERINGS:
        raise UsageError(f"{op} already has a built-in kernel", hint="give the op another name")
    for header in headers:
        if not header.is_file():
            raise UsageError("no such header", where=str(header))
        if not re.fullmatch(r"\w+\.hpp", header.name):
            raise UsageError("expected a file name such as my_kernel.hpp", where=str(header))
    _EXTENSIONS[op] = Extension(lowering, tuple(headers))


def find_extension(op: str) -> Extension | None:
    """What a plug-in registered for the op; None where none did."""
    if op not in _EXTENSIONS:
        load_plugins()
    return _EXTENSIONS.get(op)


def extension_headers(ops: Sequence[str]) -> dict[str, bytes]:
    """The headers that these ops need, by file name; UsageError where two differ under a name."""
    result: dict[str, bytes] = {}
    for op in ops:
        for path in _EXTENSIONS[op].headers if op in _EXTENSIONS else ():
            data = path.read_bytes()
            if result.setdefault(path.name, data) != data:
                raise UsageError(f"two plug-ins have a header named {path.name}", where=str(path))
    return result


def row_kernel(function: str, attrs: Sequence[str] = ()) -> Lowering:
    """The lowering for a C++ function over rows of the last dimension.

    It is called as `function<T>(t, x, ldx, ..., y, ldy, ..., rows, width)` and then the attributes
    that `attrs` names, as numbers: `T` is the C++ type of the first result; for each operand its
    address and the elements from row to row (0 for a weight of one dimension, the same for every
    row), then each result likewise; `rows` their number, `width` the elements of the first
    operand's row. Every thread of the team `t` calls it, for its own share of the rows.
    """

    def lower(e: Emitter, node: Node) -> None:
        args: list[Arg | int] = []
        reads: list[Buffer] = []
        first = None
        for operand in node.inputs:
            kind = e.program.operand_type(operand)
            if isinstance(kind, TensorType) and kind.rank == 1 and first is not None:
                weight = e.dense(e.buffer(operand))
                address, stride, touched = pointer(weight), "0", weight
            else:
                rows = e.rows(operand)
                address, stride, touched = rows.pointer, rows.stride, rows.buffer
                first = first or rows
            args += [address, stride]
            reads.append(touched)
        assert first is not None, "an op has an operand"
        results = [e.output(value) for value in node.outputs]
        for result in results:
            args += [pointer(result), e.rows(result).stride]
        args += [first.count, first.length, *(_literal(node, name) for name in attrs)]
        kernel = f"{function}<{results[0].ctype}>"
        e.call(kernel, args, reads=reads, writes=results, comment=node.op)

    return lower


def _literal(node: Node, name: str) -> str:
    value = node.attrs[name]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return f"{value!r}f"
    raise UsageError(f"attribute {name} is {value!r}, expected a number", where=node.op)
