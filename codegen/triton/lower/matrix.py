"""Matrix products, and the gated activation that follows them."""

from __future__ import annotations

from ....ir.program import Node
from ....ir.types import DType
from ..buffers import Buffer, product
from ..calls import TYPES, Tuning, extent
from ..configurations import linear_tile
from ..emitter import Emitter, Lowering, Rows, power_of_two, whole


def lower_linear(e: Emitter, node: Node) -> None:
    """`linear(x, w, bias?)`: rows of x by a matrix, in tiles that `tables/linear.json` has."""
    product_of_rows(e, node, e.rows(node.inputs[0]), e.output(node.output))


def product_of_rows(
    e: Emitter, node: Node, x: Rows, out: Buffer, residual: Buffer | None = None
) -> None:
    """A product, to which dense rows may be added once it is rounded to its type."""
    w = e.dense(e.buffer(node.inputs[1]))
    bias = [e.dense(e.buffer(operand)) for operand in node.inputs[2:]]
    n, k = whole(w.shape[0], "a matrix"), x.length
    bits = 8 * w.dtype.size_bytes
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
            "ADDED": "" if residual is None else TYPES[node.output.type.dtype],
        },
        tile.tuning,
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
