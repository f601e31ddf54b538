"""Rows taken by index: embeddings, logits rows; the top of a row, and elements of it."""

from __future__ import annotations

from ....ir.program import Node, WeightRef
from ....ir.schemes import get_scheme
from ..buffers import codes_type
from ..calls import WeightPtr, c_dim
from ..emitter import Emitter, Lowering, pointer
from ..expressions import literal


def lower_embedding(e: Emitter, node: Node) -> None:
    """`embedding(table, ids)`; a table that a product also reads lies packed, and stays so."""
    table, ids = node.inputs[0], e.dense(e.buffer(node.inputs[1]))
    out = e.output(node.output)
    count = " * ".join(c_dim(d) for d in ids.shape) or "1"
    if isinstance(table, WeightRef) and table.name in e.weights.packed_names:
        weight = e.program.weights[table.name].type
        packed = WeightPtr("char", e.weights.packed(table.name))
        e.call(
            f"embedding_packed<{out.ctype}>",
            (packed, pointer(ids), pointer(out), count, c_dim(weight.shape[1])),
            reads=(ids,),
            writes=(out,),
            comment=node.op,
        )
        return
    rows = e.dense(e.buffer(table))
    e.call(
        f"embedding_rows<{out.ctype}>",
        (pointer(rows), pointer(ids), pointer(out), count, c_dim(rows.shape[-1])),
        reads=(rows, ids),
        writes=(out,),
        comment=node.op,
    )


def lower_scaled_embedding(e: Emitter, node: Node) -> None:
    """`scaled_embedding(table, table_scale, ids)`: from the panels that a product reads, too."""
    table = node.inputs[0]
    assert isinstance(table, WeightRef), "supports() takes a table that is a weight only"
    scale, ids = (e.dense(e.buffer(node.inputs[place])) for place in (1, 2))
    out = e.output(node.output)
    count = " * ".join(c_dim(d) for d in ids.shape) or "1"
    scheme = get_scheme(node.attrs["scheme"])
    packed = WeightPtr("char", e.weights.packed(table.name, scheme.weight))
    e.call(
        f"scaled_embedding<{codes_type(scheme)}>",
        (packed, pointer(scale), pointer(ids), pointer(out), count, str(node.attrs["width"])),
        reads=(scale, ids),
        writes=(out,),
        comment=node.op,
    )


def lower_take(e: Emitter, node: Node) -> None:
    """`take(x, index)` along the first dimension: whole rows."""
    rows = e.buffer(node.inputs[0])
    x = e.rows(rows, inner_dims=len(rows.shape) - 1)
    index = e.dense(e.buffer(node.inputs[1]))
    out = e.output(node.output)
    count = " * ".join(c_dim(d) for d in index.shape) or "1"
    e.call(
        f"take_rows<{out.ctype}>",
        (x.pointer, x.stride, pointer(index), pointer(out), x.length, count, x.length),
        reads=(x.buffer, index),
        writes=(out,),
        comment=node.op,
    )


def lower_topk(e: Emitter, node: Node) -> None:
    """`topk(x)` → values and indices over the last dimension, ties to the lower index."""
    x = e.rows(node.inputs[0])
    values, indices = e.output(node.outputs[0]), e.output(node.outputs[1])
    e.call(
        "topk_rows",
        (
            *(x.pointer, x.stride, pointer(values), pointer(indices)),
            *(x.count, x.length, str(node.attrs["k"])),
        ),
        reads=(x.buffer,),
        writes=(values, indices),
        comment=node.op,
    )


def lower_gather(e: Emitter, node: Node) -> None:
    """`gather(x, index)` along the last dimension: each row picks from itself."""
    x, index = e.rows(node.inputs[0]), e.dense(e.buffer(node.inputs[1]))
    out = e.output(node.output)
    e.call(
        "gather_rows",
        (
            *(x.pointer, x.stride, pointer(index), pointer(out)),
            *(x.count, c_dim(index.shape[-1])),
        ),
        reads=(x.buffer, index),
        writes=(out,),
        comment=node.op,
    )


def lower_scatter(e: Emitter, node: Node) -> None:
    """`scatter(x, index){value}` along the last dimension: each row into itself."""
    x, index = e.rows(node.inputs[0]), e.dense(e.buffer(node.inputs[1]))
    out = e.output(node.output)
    value = node.attrs["value"]
    assert isinstance(value, float), "scatter has a number"
    e.call(
        "scatter_rows",
        (
            *(x.pointer, x.stride, pointer(index), pointer(out)),
            *(x.count, x.length, c_dim(index.shape[-1]), literal(value)),
        ),
        reads=(x.buffer, index),
        writes=(out,),
        comment=node.op,
    )


def lower_softmax(e: Emitter, node: Node) -> None:
    """`softmax(x)` over the last dimension."""
    x = e.rows(node.inputs[0])
    out = e.output(node.output)
    e.call(
        "softmax_rows",
        (x.pointer, x.stride, pointer(out), x.length, x.count, x.length),
        reads=(x.buffer,),
        writes=(out,),
        comment=node.op,
    )


def lower_full(e: Emitter, node: Node) -> None:
    """`full{shape, value}`."""
    out = e.output(node.output)
    count = " * ".join(c_dim(d) for d in out.shape) or "1"
    value = node.attrs["value"]
    assert isinstance(value, (bool, int, float)), "full has a number"
    text = literal(value, node.output.type.dtype)
    e.call(
        f"fill<{out.ctype}>",
        (pointer(out), count, text),
        reads=(),
        writes=(out,),
        comment=node.op,
    )


def lower_iota(e: Emitter, node: Node) -> None:
    """`iota{size}`: 0, 1, 2, …"""
    out = e.output(node.output)
    e.call(
        f"iota<{out.ctype}>",
        (pointer(out), c_dim(out.shape[0])),
        reads=(),
        writes=(out,),
        comment=node.op,
    )


LOWERINGS: dict[str, Lowering] = {
    "embedding": lower_embedding,
    "scaled_embedding": lower_scaled_embedding,
    "take": lower_take,
    "topk": lower_topk,
    "gather": lower_gather,
    "scatter": lower_scatter,
    "softmax": lower_softmax,
    "full": lower_full,
    "iota": lower_iota,
}
