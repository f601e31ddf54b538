"""Pairs of neighbouring nodes that become one launch, where no pass has made one op of them."""

from __future__ import annotations

from collections.abc import Callable

from ...ir.program import Node
from .buffers import Buffer
from .calls import TYPES, extent
from .configurations import linear_tile
from .emitter import Emitter, whole
from .lower.gather import pick_rows

Fusion = Callable[[Emitter, Node, Node], bool]


def lower_pair(e: Emitter, first: Node, second: Node) -> bool:
    """Lower two neighbours as one launch; False, and nothing, where that is not possible."""
    fusion = _FUSIONS.get((first.op, second.op))
    if fusion is None or not _is_alone(e, first, second):
        return False
    return fusion(e, first, second)


def _is_alone(e: Emitter, first: Node, second: Node) -> bool:
    """Whether only the second reads what the first makes."""
    name = first.output.name
    readers = e.consumers.get(name, [])
    outputs = {value.name for value in e.program.outputs}
    return readers == [second] and name not in outputs and second.values() == (first.output,)


def _embedding_cast(e: Emitter, embedding: Node, cast: Node) -> bool:
    """Rows of a table in another type. Nothing that is read lies in the arena, so that the result
    can have its planned place one node too early."""
    pick_rows(e, e.rows(embedding.inputs[0]), embedding.inputs[1], cast.output)
    return True


def _linear_gated(e: Emitter, linear: Node, gated: Node) -> bool:
    """A product with the gated activation behind it, for few rows: these wait for launches.

    The place that is planned for the result may be that of the rows of the product, so the result
    has one that layers share: only the node behind may read it.
    """
    readers = e.consumers.get(gated.output.name, [])
    following = e.program.nodes.index(gated) + 1
    if not e.form.one_query or following >= len(e.program.nodes):
        return False
    if readers != [e.program.nodes[following]] or gated.output in e.program.outputs:
        return False
    x = e.rows(linear.inputs[0])
    w, *bias = (e.dense(e.buffer(operand)) for operand in linear.inputs[1:])
    kind = gated.output.type
    n = whole(kind.shape[-1], "a row")
    rows = e.most(x.count)
    tile = linear_tile(e.target, rows=rows, bits=8 * w.dtype.size_bytes)
    columns = max(16, tile.columns // 2)
    home = e.scratch("gated", rows * n * kind.dtype.size_bytes)
    out = Buffer.dense(home, kind.dtype, kind.shape)
    e.buffers[gated.output.name] = out
    act = gated.attrs["act"]
    assert isinstance(act, str)
    e.launch(
        "linear.linear_gated",
        [extent(n, divisor=columns), extent(x.count, divisor=tile.rows)],
        {
            **{"x": x.typed, "w": w, "bias": bias[0] if bias else w, "out": out},
            **{"M": extent(x.count), "N": n, "K": x.length, "x_stride": x.stride},
        },
        {
            **{"BM": tile.rows, "BN": columns, "BK": tile.depth, "ACT": act},
            **{"EVEN": x.length % tile.depth == 0, "BIAS": bool(bias)},
            "BETWEEN": TYPES[linear.output.type.dtype],
        },
        tile.tuning,
    )
    return True


_FUSIONS: dict[tuple[str, str], Fusion] = {
    ("embedding", "cast"): _embedding_cast,
    ("linear", "gated_act"): _linear_gated,
}
"""By the ops of both nodes."""
