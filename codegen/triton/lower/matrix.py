"""Matrix products, and the gated activation that follows them."""

from __future__ import annotations

from collections.abc import Mapping

from ....ir.program import Node
from ....ir.types import DType
from ..boxes import ELEMENT_BYTES
from ..buffers import Buffer, product
from ..calls import ALIGNED_BYTES, TYPES, Constant, Tiles, Tuning, extent
from ..configurations import BoxTile, box_tile, linear_tile
from ..emitter import Emitter, Lowering, Rows, power_of_two, whole


def lower_linear(e: Emitter, node: Node) -> None:
    """`linear(x, w, bias?)`: rows of x by a matrix, in tiles that `tables/linear.json` has."""
    product_of_rows(e, node, e.rows(node.inputs[0]), e.output(node.output))


def product_of_rows(
    e: Emitter,
    node: Node,
    x: Rows,
    out: Buffer,
    *,
    residual: Buffer | None = None,
    act: Node | None = None,
) -> None:
    """A product that is rounded to its type, then goes through an activation of one operand, or has
    dense rows added."""
    w = e.dense(e.buffer(node.inputs[1]))
    bias = [e.dense(e.buffer(operand)) for operand in node.inputs[2:]]
    n, k = whole(w.shape[0], "a matrix"), x.length
    bits = 8 * w.dtype.size_bytes
    boxes = box_tile(e.target, rows=e.most(x.count), bits=bits)
    if boxes is not None and residual is None and _has_boxes(x, w, out):
        _product_by_boxes(e, boxes, x, w, bias, out, activated(node, act))
        return
    tile = linear_tile(e.target, rows=e.most(x.count), bits=bits)
    e.launch(
        "linear.linear",
        [extent(n, divisor=tile.columns), extent(x.count, divisor=tile.rows)],
        {
            **{"x": x.typed, "w": w, "bias": bias[0] if bias else w},
            **{"residual": w if residual is None else residual, "out": out},
            **{"M": extent(x.count), "N": n, "K": k, "x_stride": x.stride},
        },
        {
            "BM": tile.rows,
            "BN": tile.columns,
            "BK": tile.depth,
            "GROUP": tile.group,
            "EVEN": k % tile.depth == 0,
            "BIAS": bool(bias),
            **activated(node, act),
            "ADDED": "" if residual is None else TYPES[node.output.type.dtype],
        },
        tile.tuning,
    )


def activated(product: Node, act: Node | None) -> dict[str, Constant]:
    """The constants of a product whose result an activation behind it takes."""
    name = "" if act is None else activation(act)
    assert name is not None
    return {"ACT": name, "BETWEEN": "" if act is None else TYPES[product.output.type.dtype]}


def activation(node: Node) -> str | None:
    """What kernels call an activation; None for other nodes."""
    if node.op == "gelu":
        return "gelu_tanh" if node.attrs["approximate"] == "tanh" else "gelu"
    act = node.attrs["act"] if node.op == "gated_act" else node.op
    assert isinstance(act, str)
    return act if node.op in ("gated_act", "silu", "relu") else None


def _has_boxes(x: Rows, w: Buffer, out: Buffer) -> bool:
    """Whether descriptors can be made: of dense rows of whole words, at addresses of such."""
    if x.stride != x.length or x.buffer.dtype is not w.dtype:
        return False
    widths = ((x.buffer, x.length), (w, x.length), (out, whole(w.shape[0], "a matrix")))
    return all(
        TYPES[one.dtype] in ELEMENT_BYTES
        and width * one.dtype.size_bytes % ALIGNED_BYTES == 0
        and one.pointer.space in ("arena", "weight")
        and one.pointer.offset % ALIGNED_BYTES == 0
        for one, width in widths
    )


def _product_by_boxes(
    e: Emitter,
    tile: BoxTile,
    x: Rows,
    w: Buffer,
    bias: list[Buffer],
    out: Buffer,
    act: Mapping[str, Constant],
) -> None:
    n, k = whole(w.shape[0], "a matrix"), x.length
    rows = extent(x.count)
    most = -(-e.most(x.count) // tile.rows) * -(-n // tile.columns)
    e.launch(
        "linear.linear_boxes",
        [min(tile.programs, most)],
        {
            "x": Tiles(x.buffer.pointer, x.buffer.dtype, (rows, k), (tile.rows, tile.depth)),
            "w": Tiles(w.pointer, w.dtype, (extent(n), k), (tile.columns, tile.depth)),
            "bias": bias[0] if bias else w,
            "out": Tiles(out.pointer, out.dtype, (rows, n), (tile.rows, tile.columns)),
            **{"M": rows, "N": n, "K": k},
        },
        {
            **{"BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "GROUP": tile.group},
            **{"BIAS": bool(bias), **act},
        },
        tile.tuning,
        persistent=True,
    )


def lower_gated_act(e: Emitter, node: Node) -> None:
    """`gated_act(gate_up)`: act(gate) * up, with gate in the first half of a row."""
    x = e.rows(node.inputs[0])
    out = e.output(node.output)
    width = x.length // 2
    act = node.attrs["act"]
    assert isinstance(act, str)
    block = min(1024, power_of_two(width))
    e.launch(
        "linear.gated_act",
        [x.count, extent(width, divisor=block)],
        {"x": x.typed, "out": out},
        {"STRIDE": x.stride, "WIDTH": width, "BLOCK": block, "ACT": act},
        Tuning(4 if block >= 512 else 1),
    )


def lower_matmul(e: Emitter, node: Node) -> None:
    """`matmul(a, b)` of two computed matrices: rare, so one plain kernel."""
    a, b = e.buffer(node.inputs[0]), e.buffer(node.inputs[1])
    out = e.output(node.output)
    *batch, m, n = out.shape
    k = a.shape[-1]
    a, b = e.dense(a.expand((*batch, m, k))), e.dense(b.expand((*batch, k, n)))
    tile = linear_tile(e.target, rows=16, bits=32)
    e.launch(
        "linear.matmul",
        [
            extent(n, divisor=tile.columns),
            extent(m, divisor=tile.rows),
            extent(product(tuple(batch))),
        ],
        {"a": a, "b": b, "out": out, "M": extent(m), "N": extent(n), "K": extent(k)},
        {"BM": tile.rows, "BN": tile.columns, "BK": tile.depth},
        tile.tuning,
    )


MATRIX_TYPES = (DType.F32, DType.BF16, DType.F16)
"""Element types of matrices that products take."""

LOWERINGS: dict[str, Lowering] = {
    "linear": lower_linear,
    "gated_act": lower_gated_act,
    "matmul": lower_matmul,
}
