"""Which products are next to a value: routers of experts, the head, those of attention, others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from ..ir.ops import Kind, get_op
from ..ir.program import Node, Operand, Program, Value

_PRODUCTS: Final = ("linear", "scaled_linear", "decoded_linear")
_ONWARDS: Final = frozenset({"reshape", "transpose", "slice", "concat", "cast", "mul"})
"""Ops that the result of attention may pass on its way to a product, beside norms."""
_ACTIVATIONS: Final = frozenset({"silu", "gelu", "relu", "sigmoid", "tanh", "erf", "gated_act"})


def nearest_products(program: Program, operands: Sequence[Operand]) -> set[int]:
    """The ids of the nearest products, of whatever form, that these operands are computed from."""
    behind = _behind(program.producers(), operands, _is_product)
    return {id(node) for node in behind if _is_product(node)}


def _is_product(node: Node) -> bool:
    return node.op in _PRODUCTS


def _behind(
    producers: Mapping[str, Node], operands: Sequence[Operand], is_end: Callable[[Node], bool]
) -> Iterator[Node]:
    """The nodes that these operands are computed from, up to ends."""
    seen: set[str] = set()
    pending = [operand for operand in operands if isinstance(operand, Value)]
    while pending:
        value = pending.pop()
        node = producers.get(value.name)
        if node is None or value.name in seen:
            continue
        seen.add(value.name)
        yield node
        if not is_end(node):
            pending.extend(node.values())


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
            if _is_product(node) and node.inputs[0] == value:
                found.add(id(node))
            elif node.op in _ONWARDS or get_op(node.op).kind is Kind.NORM:
                pending.extend(node.outputs)
    return found


def query_products(program: Program) -> set[int]:
    """The ids of the products that make queries, and nothing else of attention."""
    nodes = [node for node in program.nodes if get_op(node.op).kind is Kind.ATTENTION]
    others = nearest_products(program, [x for node in nodes for x in node.inputs[1:]])
    return nearest_products(program, [node.inputs[0] for node in nodes]) - others


def feed_forward_products(program: Program) -> set[int]:
    """The ids of the products that read what an activation function gives, outside of attention."""
    producers = program.producers()

    def is_end(node: Node) -> bool:
        is_residual = node.op == "add" and len(list(node.values())) > 1
        return _is_product(node) or get_op(node.op).kind is Kind.EXPERTS or is_residual

    def reads_activation(node: Node) -> bool:
        return any(x.op in _ACTIVATIONS for x in _behind(producers, node.inputs, is_end))

    found = {id(x) for x in program.nodes if _is_product(x) and reads_activation(x)}
    return found - attention_products(program)
