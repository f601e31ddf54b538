"""Programs whose values have other names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from infc.ir.program import Operand, Program, Value


def rename_values(program: Program, rename: Callable[[Value], str]) -> Program:
    """Every value under another name, which `rename` makes from it; names must stay unique."""
    names: dict[str, str] = {}
    values = [*program.inputs, *(value for node in program.nodes for value in node.outputs)]
    for value in values:
        names[value.name] = rename(value)
    assert len(set(names.values())) == len(names), "two values have the same name"

    def renamed(operand: Operand) -> Operand:
        return Value(names[operand.name], operand.type) if isinstance(operand, Value) else operand

    def each(items: Iterable[Value]) -> tuple[Value, ...]:
        return tuple(Value(names[value.name], value.type) for value in items)

    nodes = tuple(
        replace(node, inputs=tuple(map(renamed, node.inputs)), outputs=each(node.outputs))
        for node in program.nodes
    )
    outputs = each(program.outputs)
    return replace(program, inputs=each(program.inputs), nodes=nodes, outputs=outputs)
