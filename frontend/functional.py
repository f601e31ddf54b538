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


def join_filled_parts(graph: fx.Graph) -> None:
    """`x = empty(...); x[..., :4].copy_(a); x[..., 4:].copy_(b)` becomes `x = cat([a, b], -1)`.

    What is not filled whole, along one dimension and before it is read, is left as it is.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for base in list(graph.nodes):
        if base.target not in _EMPTY:
            continue
        found = _parts_of(base)
        if found is None:
            continue
        dim, parts = found
        copies = [copy for _, _, copy in parts]
        last = max(copies, key=order.__getitem__)
        readers = [user for user in base.users if user not in {part for _, part, _ in parts}]
        if any(order[user] < order[last] for user in readers):
            continue
        with graph.inserting_after(last):
            sources = [copy.args[1] for copy in copies]
            joined = graph.call_function(torch.ops.aten.cat.default, (sources, dim))
        joined.meta = dict(base.meta)
        for reader in readers:
            reader.replace_input_with(base, joined)
        for _, part, copy in parts:
            graph.erase_node(copy)
            graph.erase_node(part)


_EMPTY = frozenset(
    {
        torch.ops.aten.new_empty.default,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty.memory_format,
    }
)

_Part = tuple[int, fx.Node, fx.Node]
"""Where a filled part begins, its slice, and the copy into it."""


def _parts_of(base: fx.Node) -> tuple[int, list[_Part]] | None:
    """The dimension along which filled slices make up all of `base`, and these in order."""
    shape = base.meta["val"].shape
    parts: list[_Part] = []
    dims: set[int] = set()
    for part in base.users:
        if part.target is not torch.ops.aten.slice.Tensor or len(part.args) != 4:
            continue
        (copy,) = part.users if len(part.users) == 1 else (None,)
        _, dim, start, _ = part.args
        if copy is None or copy.target is not torch.ops.aten.copy_.default or copy.users:
            continue
        if not isinstance(dim, int) or not isinstance(start, int) or copy.args[0] is not part:
            continue
        to, source = part.meta["val"], copy.args[1].meta["val"]  # type: ignore[union-attr]
        if to.dtype != source.dtype or to.shape != source.shape:
            return None
        dims.add(dim % len(shape))
        parts.append((start, part, copy))
    if len(dims) != 1:
        return None
    (dim,) = dims
    parts.sort(key=lambda part: part[0])
    end = 0
    for start, part, _ in parts:
        if start != end:
            return None
        end += part.meta["val"].shape[dim]
    return (dim, parts) if end == shape[dim] else None


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
                raise UnsupportedModelError(f"{node.target} modifies memory that other nodes read")
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
