"""What a program shows of its model's shape: whatever passes made of it, not what was captured."""

from __future__ import annotations

from collections.abc import Iterator

from ...ir.formats import get_format
from ...ir.ops import get_op
from ...ir.ops.base import int_attr
from ...ir.program import Node, Program, hidden_width, vocabulary_size
from ...ir.resources import KvGroup
from ...ir.weights import leaves
from .facts import AttentionFacts, ShapeFacts


def model_shape(program: Program) -> ShapeFacts:
    """Layers, heads, windows, width, vocabulary and parameters as the program has them."""
    kinds: dict[tuple[int, int, int, int | None], list[int]] = {}
    for node in program.nodes:
        layer = node.attrs.get("layer")
        if get_op(node.op).mixer and isinstance(layer, int):
            kinds.setdefault(_attention(program, node), []).append(layer)
    return ShapeFacts(
        num_layers=len({node.layer for node in program.nodes} - {None}),
        width=hidden_width(program) or program.spec.hidden_size,
        vocabulary=vocabulary_size(program) or program.spec.vocab_size,
        num_parameters=_num_parameters(program),
        attention=tuple(
            AttentionFacts(
                layers=tuple(layers), heads=heads, head_dim=dim, kv_heads=kv, window=window
            )
            for (heads, dim, kv, window), layers in kinds.items()
        ),
        sharing=tuple(
            int_attr(node.attrs, "layer")
            for node in program.nodes
            if node.attrs.get("cache") is not None and get_op(node.op).mixer
        ),
    )


def _attention(program: Program, node: Node) -> tuple[int, int, int, int | None]:
    """Heads, their size, KV heads and window of an attention op."""
    _, heads, dim = node.values()[0].type.shape[-3:]
    groups = {g.name: g.num_kv_heads for g in program.resources if isinstance(g, KvGroup)}
    kv = groups.get(str(node.attrs.get("group")))
    if kv is None:
        kv = node.values()[1].type.shape[-2] if len(node.values()) > 1 else heads  # type: ignore[assignment]
    window = node.attrs["window"]
    assert isinstance(heads, int)
    assert isinstance(dim, int)
    assert isinstance(kv, int)
    return heads, dim, kv, window if isinstance(window, int) else None


def _num_parameters(program: Program) -> int:
    """Elements of the checkpoint tensors that nodes read; those of the model if it is not known
    what weights were made of."""
    exprs = (program.weights[ref.name].expr for node in program.nodes for ref in node.weights())
    if any(leaf.op == "calibrated" for expr in exprs for leaf in leaves(expr)):
        return program.spec.num_parameters
    return sum(dict(_leaf_sizes(program)).values()) or program.spec.num_parameters


def _leaf_sizes(program: Program) -> Iterator[tuple[str, int]]:
    for node in program.nodes:
        for ref in node.weights():
            for leaf in leaves(program.weights[ref.name].expr):
                shape = leaf.attrs.get("shape")
                if leaf.op not in ("checkpoint", "packed") or not isinstance(shape, tuple):
                    continue
                count = 1
                for size in shape:
                    assert isinstance(size, int)
                    count *= size
                if leaf.op == "packed":
                    form = get_format(leaf.attrs["stored"])
                    count = count // form.block_bytes * form.group
                yield str(leaf.attrs["name"]), count
