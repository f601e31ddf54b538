"""Rows taken by index, the top of a row, elements of it, and tensors made from nothing."""

from __future__ import annotations

from ....ir.program import Node, Operand, Value
from ..buffers import product
from ..calls import Tuning, extent
from ..emitter import Emitter, Lowering, Rows, power_of_two
from .norms import row_tuning


def lower_embedding(e: Emitter, node: Node) -> None:
    """`embedding(table, ids)`: rows of a table."""
    pick_rows(e, e.rows(node.inputs[0]), node.inputs[1], node.output)


def lower_take(e: Emitter, node: Node) -> None:
    """`take(x, index)` along the first dimension: whole rows."""
    buffer = e.buffer(node.inputs[0])
    rows = e.rows(buffer, inner_dims=len(buffer.shape) - 1)
    pick_rows(e, rows, node.inputs[1], node.output)


def pick_rows(e: Emitter, x: Rows, by: Operand, result: Value) -> None:
    """Rows of x by index, in the type of the result."""
    index = e.dense(e.buffer(by))
    out = e.output(result)
    block = min(1024, power_of_two(x.length))
    e.launch(
        "rows.pick_rows",
        [product(index.shape), extent(x.length, divisor=block)],
        {"x": x.typed, "index": index, "out": out},
        {"STRIDE": x.stride, "WIDTH": x.length, "BLOCK": block},
        row_tuning(block),
    )


def lower_topk(e: Emitter, node: Node) -> None:
    """`topk(x)` → values and indices over the last dimension, ties to the lower index."""
    x = e.rows(node.inputs[0])
    values, indices = (e.output(value) for value in node.outputs)
    k = node.attrs["k"]
    assert isinstance(k, int)
    block = power_of_two(x.length)
    e.launch(
        "rows.top_of_rows",
        [x.count],
        {"x": x.typed, "values": values, "indices": indices},
        {"STRIDE": x.stride, "WIDTH": x.length, "K": k, "BLOCK": block},
        row_tuning(block),
    )


def lower_gather(e: Emitter, node: Node) -> None:
    """`gather(x, index)` along the last dimension: each row picks from itself."""
    x, index = e.rows(node.inputs[0]), e.rows(e.dense(e.buffer(node.inputs[1])))
    out = e.output(node.output)
    e.launch(
        "rows.gather_elements",
        [x.count],
        {"x": x.typed, "index": index.typed, "out": out},
        {"STRIDE": x.stride, "COUNT": index.length, "BLOCK": power_of_two(index.length)},
        Tuning(1),
    )


def lower_scatter(e: Emitter, node: Node) -> None:
    """`scatter(x, index){value}` along the last dimension: each row into itself."""
    x, index = e.rows(node.inputs[0]), e.rows(e.dense(e.buffer(node.inputs[1])))
    out = e.output(node.output)
    value = node.attrs["value"]
    assert isinstance(value, float)
    block = min(1024, power_of_two(x.length))
    e.launch(
        "rows.scatter_value",
        [x.count],
        {"x": x.typed, "index": index.typed, "out": out, "value": value},
        {
            "STRIDE": x.stride,
            "WIDTH": x.length,
            "COUNT": index.length,
            "BLOCK": block,
            "FEW": power_of_two(index.length),
        },
        row_tuning(block),
    )


def lower_full(e: Emitter, node: Node) -> None:
    """`full{shape, value}`."""
    out = e.output(node.output)
    value = node.attrs["value"]
    assert isinstance(value, (bool, int, float))
    count = product(out.shape)
    e.launch(
        "rows.fill",
        [extent(count, divisor=1024)],
        {"out": out, "count": extent(count), "value": float(value)},
        {"BLOCK": 1024},
    )


def lower_iota(e: Emitter, node: Node) -> None:
    """`iota{size}`: 0, 1, 2, …"""
    out = e.output(node.output)
    count = out.shape[0]
    e.launch(
        "rows.iota",
        [extent(count, divisor=1024)],
        {"out": out, "count": extent(count)},
        {"BLOCK": 1024},
    )


LOWERINGS: dict[str, Lowering] = {
    "embedding": lower_embedding,
    "take": lower_take,
    "topk": lower_topk,
    "gather": lower_gather,
    "scatter": lower_scatter,
    "full": lower_full,
    "iota": lower_iota,
}
