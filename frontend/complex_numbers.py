"""Complex tensors become real ones with a last dimension of two: real part, imaginary part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import fx

from ..ir.errors import UnsupportedModelError
from .functional import live_nodes

aten = torch.ops.aten


def replace_complex_numbers(graph: fx.Graph) -> None:
    """Rewrites what computes with complex tensors, as rotary embeddings may do, in place.

    Raises UnsupportedModelError for an operation that has no form here.
    """
    live = live_nodes(graph)
    pairs = _Pairs(graph)
    for node in list(graph.nodes):
        if node in live and (_is_complex(node) or any(map(_is_complex, node.all_input_nodes))):
            pairs.rewrite(node)


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_complex()


class _Pairs:
    """The real tensors that stand for complex ones so far, and the pen."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.of: dict[fx.Node, fx.Node] = {}

    def rewrite(self, node: fx.Node) -> None:
        """Puts a real form of `node` before it; what is real itself gets the new operands."""
        if node.op not in ("call_function", "output"):
            raise UnsupportedModelError(f"{node.name} is complex")
        target: Any = node.target
        name = getattr(target, "__name__", str(target))
        with self.graph.inserting_before(node):
            if name == "view_as_real.default":
                node.replace_all_uses_with(self._operand(node.args[0]))
            elif name in _REWRITES:
                self.of[node] = _REWRITES[name](self, node)
            elif name in _CARRIERS:
                made = self.emit(target, self._operand(node.args[0]), *node.args[1:], like=node)
                self.of[node] = made
            elif name == "repeat_layer.default":
                node.args = fx.node.map_arg(node.args, self._operand)
            else:
                raise UnsupportedModelError(f"{name} of complex numbers is not supported")

    def emit(self, target: Any, *args: Any, like: fx.Node) -> fx.Node:
        """One node, typed by running the operation on the fake tensors of its operands."""
        node = self.graph.call_function(target, args)
        node.meta = dict(like.meta)
        values = fx.node.map_arg(args, lambda arg: arg.meta["val"])
        node.meta["val"] = target(*values)
        return node

    def part(self, node: fx.Node, index: int) -> fx.Node:
        """The real (0) or imaginary (1) part of what stands for a complex tensor."""
        return self.emit(aten.select.int, node, -1, index, like=node)

    def _operand(self, arg: Any) -> Any:
        return self.of.get(arg, arg)


def _polar(pairs: _Pairs, node: fx.Node) -> fx.Node:
    size, angle = node.args[:2]
    parts = [
        pairs.emit(aten.mul.Tensor, size, pairs.emit(turn, angle, like=node), like=node)
        for turn in (aten.cos.default, aten.sin.default)
    ]
    return pairs.emit(aten.stack.default, parts, -1, like=node)


def _same(pairs: _Pairs, node: fx.Node) -> fx.Node:
    arg = node.args[0]
    assert isinstance(arg, fx.Node)
    if _is_complex(node) and _is_complex(arg) and node.meta["val"].dtype != arg.meta["val"].dtype:
        raise UnsupportedModelError("changing the precision of complex numbers is not supported")
    return pairs.of.get(arg, arg)


def _unsqueeze(pairs: _Pairs, node: fx.Node) -> fx.Node:
    source, dim = node.args[:2]
    assert isinstance(source, fx.Node)
    assert isinstance(dim, int)
    place = dim if dim >= 0 else dim - 1
    return pairs.emit(aten.unsqueeze.default, pairs.of[source], place, like=node)


def _mul(pairs: _Pairs, node: fx.Node) -> fx.Node:
    known = [pairs.of[arg] for arg in node.args[:2] if isinstance(arg, fx.Node) and arg in pairs.of]
    if len(known) == 1:
        (real,) = (arg for arg in node.args[:2] if arg not in pairs.of)
        if isinstance(real, fx.Node):
            real = pairs.emit(aten.unsqueeze.default, real, -1, like=node)
        return pairs.emit(aten.mul.Tensor, known[0], real, like=node)
    a, b, c, d = (pairs.part(number, i) for number in known for i in (0, 1))

    def product(x: fx.Node, y: fx.Node) -> fx.Node:
        return pairs.emit(aten.mul.Tensor, x, y, like=node)

    first = pairs.emit(aten.sub.Tensor, product(a, c), product(b, d), like=node)
    second = pairs.emit(aten.add.Tensor, product(a, d), product(b, c), like=node)
    return pairs.emit(aten.stack.default, [first, second], -1, like=node)


_REWRITES: Final[dict[str, Callable[[_Pairs, fx.Node], fx.Node]]] = {
    "polar.default": _polar,
    "mul.Tensor": _mul,
    "unsqueeze.default": _unsqueeze,
    **dict.fromkeys(
        (
            "view_as_complex.default",
            "to.dtype_layout",
            "to.device",
            "to.dtype",
            "clone.default",
            "contiguous.default",
            "detach.default",
            "alias.default",
        ),
        _same,
    ),
}
_CARRIERS: Final = frozenset({"layer_begin.default", "layer_end.default"})
