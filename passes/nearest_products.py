"""Which products are next to a value: the routers of experts, the head, those of attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ..ir.ops import Kind, get_op
from ..ir.program import Operand, Program, Value

_PRODUCTS: Final = ("linear", "scaled_linear", "decoded_linear")
_ONWARDS: Final = frozenset({"reshape", "transpose", "slice", "concat", "cast", "mul"})
"""Ops that the result of attention may pass on its way to a product, beside norms."""


def nearest_products(program: Program, operands: Sequence[Operand]) -> set[int]:
    """The ids of the nearest products, of whatever form, that these operands are computed from."""
    producers = program.producers()
    found: set[int] = set()
    seen: set[str] = set()
    pending = [operand for operand in operands if isinstance(operand, Value)]
    while pending:
        value = pending.pop()
        node = producers.get(value.name)
        if node is None or value.name in seen:
            continue
        seen.add(value.name)
        if node.op in _PRODUCTS:
            found.add(id(node))
        else:
            pending.extend(node.values())
    return found


def routers(program: Program) -> set[int]:
    """The ids of the linears that choose experts for tokens, and weigh them."""
    experts = [node for node in program.nodes if get_op(node.op).kind is Kind.EXPERTS]
    return nearest_products(program, [x for node in experts for x in node.inputs[1:3]])


def attention_products(program: Program) -> set[int]:
    """The ids of the products that make queries, keys and values, and that read the results."""
    nodes = [node for node in program.nodes if get_op(node.op).kind is Kind.ATTENTION]
    found = nearest_products(program, [x for node in nodes for x in node.inputs])
    consumers = program.consumers()
    pending = [value for node in nodes for value in node.outputs]
    seen: set[str] = set()
    while pending:
        value = pending.pop()
        if value.name in seen:
            continue
        seen.add(value.name)
        for node in consumers.get(value.name, ()):
            if node.op in _PRODUCTS and node.inputs[0] == value:
                found.add(id(node))
            elif node.op in _ONWARDS or get_op(node.op).kind is Kind.NORM:
                pending.extend(node.outputs)
    return found
