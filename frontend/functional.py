"""Exported graphs may still write in place: such ops become pure, or the model is refused."""

from __future__ import annotations

import torch
from torch import fx

from ..ir.errors import UnsupportedModelError


def live_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the graph's output needs."""
    live: set[fx.Node] = set()
    pending = [node for node in graph.nodes if node.op == "output"]
    while pending:
        node = pending.pop()
        if node not in live:
            live.add(node)
            pending.extend(node.all_input_nodes)
    return live


def replace_in_place_ops(graph: fx.Graph) -> None:
    """`x.op_(...)` becomes `y = x.op(...)`, and what read x afterwards reads y.

    Raises UnsupportedModelError where x is an input, or where another name of the same memory
    is read afterwards.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not _writes(node):
            continue
        base = node.args[0]
        target = _pure_form(node)
        if target is None or not isinstance(base, fx.Node):
            raise UnsupportedModelError(f"{node.target} writes in place")
        for alias in _aliases(base):
            read = any(order[user] > order[node] for user in alias.users)
            if alias.op == "placeholder" or (alias is not base and read):
                raise UnsupportedModelError(f"{node.target} writes to memory that others read")
        node.target = target
        later = [user for user in base.users if order[user] > order[node]]
        for user in later:
            user.replace_input_with(base, node)


def _writes(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(
        arg.alias_info is not None and arg.alias_info.is_write
        for arg in node.target._schema.arguments
    )


def _pure_form(node: fx.Node) -> torch._ops.OpOverload | None:
    assert isinstance(node.target, torch._ops.OpOverload)
    packet, _, overload = node.target.__name__.partition(".")
    if not packet.endswith("_") or packet.startswith("__"):
        return None
    pure = getattr(torch.ops.aten, packet[:-1], None)
    return getattr(pure, overload, None)


def _aliases(base: fx.Node) -> set[fx.Node]:
    """Every node that may share memory with `base`."""
    group: set[fx.Node] = set()
    pending = [base]
    while pending:
        node = pending.pop()
        if node in group:
            continue
        group.add(node)
        pending.extend(user for user in node.users if _is_view(user))
        if _is_view(node) and isinstance(node.args[0], fx.Node):
            pending.append(node.args[0])
    return group


def _is_view(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or _writes(node):
        return False
    schema = node.target._schema
    return any(result.alias_info is not None for result in schema.returns)
