"""Which attention ops share keys and values, and so one cache."""

from __future__ import annotations

from ..ir.program import Node, Program, Value


def cache_readers(program: Program) -> list[list[Node]]:
    """The attention ops by the two values that they attend to, in order: the first writes them."""
    found: dict[tuple[Value, ...], list[Node]] = {}
    for node in program.nodes:
        if node.op == "attention":
            found.setdefault(node.values()[1:3], []).append(node)
    return list(found.values())
