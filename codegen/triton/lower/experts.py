"""Routed experts."""

from __future__ import annotations

from dataclasses import dataclass

from ....ir.launches import Extent
from ....ir.program import Node
from ....ir.schemes import Scheme, get_scheme
from ....ir.types import DType, Sym
from ..buffers import Buffer, product
from ..calls import Tuning, Typed, extent
from ..configurations import LinearTile, coded_tile, linear_tile
from ..emitter import Emitter, Lowering, power_of_two, whole
from . import coded
from .norms import row_tuning


@dataclass(frozen=True, slots=True)
class _Routes:
    """Rows ordered by expert: what the products of one node share."""

    order: Typed
    tile_experts: Typed
    tiles: Extent
    tile: LinearTile
    count: Sym
    slots: int


@dataclass(frozen=True, slots=True)
class _Matrices:
    """The matrices `[E, N, K]` of one product; `scale` and `scheme` are there for codes."""

    weights: Buffer
    scale: Buffer | None
    bias: Buffer | None
    scheme: Scheme | None


def lower_moe(e: Emitter, node: Node) -> None:
    """`moe(x, index, weight, gate_up, down, gate_up_bias?, down_bias?)`."""
    up, down, *biases = (e.dense(e.buffer(operand)) for operand in node.inputs[3:])
    first, second = biases or (None, None)
    _lower(e, node, _Matrices(up, None, first, None), _Matrices(down, None, second, None))


def lower_scaled_moe(e: Emitter, node: Node) -> None:
    """`scaled_moe(x, index, weight, gate_up, gate_up_scale, down, down_scale, biases?)`."""
    up, up_scale, down, down_scale, *biases = (
        e.dense(e.buffer(operand)) for operand in node.inputs[3:]
    )
    first, second = biases or (None, None)
    scheme = get_scheme(node.attrs["scheme"])
    _lower(
        e,
        node,
        _Matrices(up, up_scale, first, scheme),
        _Matrices(down, down_scale, second, scheme),
    )


def _lower(e: Emitter, node: Node, up: _Matrices, down: _Matrices) -> None:
    x = e.dense(e.buffer(node.inputs[0]))
    index, weight = (e.dense(e.buffer(operand)) for operand in node.inputs[1:3])
    out = e.output(node.output)
    experts, doubled = (whole(size, "experts") for size in up.weights.shape[:2])
    hidden, slots = (whole(size, "a row") for size in (x.shape[1], index.shape[1]))
    routes = _route(e, index, up, experts, slots)
    inner = doubled // 2
    between = _scratch(e, "moe.up", x.dtype, routes, doubled)
    _product(e, x, hidden, slots, up, between, routes)
    turned = _scratch(e, "moe.gate", x.dtype, routes, inner)
    _gate(e, node, between, turned, routes, inner)
    parts = _scratch(e, "moe.down", x.dtype, routes, hidden)
    _product(e, turned, inner, 1, down, parts, routes)
    block = min(1024, power_of_two(hidden))
    e.launch(
        "experts.sum_slots",
        [x.shape[0], extent(hidden, divisor=block)],
        {"x": parts, "weight": weight, "out": out},
        {"SLOTS": slots, "WIDTH": hidden, "BLOCK": block},
        row_tuning(block),
    )


def _route(e: Emitter, index: Buffer, up: _Matrices, experts: int, slots: int) -> _Routes:
    count = product(index.shape)
    assert isinstance(count, Sym), "there is a route of each slot of each token"
    # An expert has the rows of a few tokens at most, however many experts there are.
    rows = max(1, -(-e.most(count) // experts))
    if up.scheme is None:
        tile = linear_tile(e.target, rows=rows, bits=8 * up.weights.dtype.size_bytes)
    else:
        tile = coded_tile(e.target, rows=rows)
    tiles = Extent(count.scale, count.name, count.offset + experts * tile.rows, tile.rows)
    most = tiles.evaluate(e.bounds)
    counts = Typed(e.scratch("moe.counts", experts * 4), "i32")
    order = Typed(e.scratch("moe.routes", most * tile.rows * 4), "i32")
    owners = Typed(e.scratch("moe.tiles", most * 4), "i32")
    e.launch(
        "experts.count_routes",
        [experts],
        {"index": index, "counts": counts, "num_routes": extent(count)},
        {"BLOCK": 1024},
    )
    e.launch(
        "experts.place_routes",
        [experts],
        {
            **{"index": index, "counts": counts, "routes": order, "tile_experts": owners},
            **{"num_routes": extent(count), "num_tiles": tiles},
        },
        {
            **{"EXPERTS": experts, "EXPERTS_BLOCK": power_of_two(experts)},
            **{"TILE": tile.rows, "BLOCK": 1024},
        },
    )
    return _Routes(order, owners, tiles, tile, count, slots)


def _product(
    e: Emitter, x: Buffer, k: int, share: int, by: _Matrices, out: Buffer, routes: _Routes
) -> None:
    """Rows of x, of which `share` routes each read one, by the matrices of their experts."""
    tile, n = routes.tile, whole(by.weights.shape[1], "a matrix")
    grid = [extent(n, divisor=tile.columns), routes.tiles]
    route = {"routes": routes.order, "tile_experts": routes.tile_experts}
    sizes = {"N": n, "K": k, "x_stride": k}
    if by.scheme is None or by.scale is None:
        bias = by.weights if by.bias is None else by.bias
        e.launch(
            "experts.expert_linear",
            grid,
            {"x": x, "w": by.weights, "bias": bias, "out": out, **route, **sizes},
            {
                **{"SHARE": share, "BM": tile.rows, "BN": tile.columns, "BK": tile.depth},
                **{"EVEN": k % tile.depth == 0, "BIAS": by.bias is not None},
            },
            tile.tuning,
        )
        return
    x_scale = by.scale
    if by.scheme.activations is not None:
        x, x_scale = _quantized(e, x, k, by.scheme)
    if by.scheme.is_fp8:
        bias = by.scale if by.bias is None else by.bias
        e.launch(
            "e4m3.expert_e4m3_linear",
            grid,
            {
                **{"x": x, "x_scale": x_scale, "codes": by.weights, "w_scale": by.scale},
                **{"bias": bias, "out": out, **route, **sizes},
            },
            {
                **{"SHARE": share, **coded.e4m3_tile(e, by.scheme, tile)},
                "BIAS": by.bias is not None,
            },
            tile.tuning,
        )
        return
    e.launch(
        "coded.expert_coded_linear",
        grid,
        {
            **{"x": x, "x_scale": x_scale, **coded.addresses(by.weights), "w_scale": by.scale},
            **{"bias": by.scale if by.bias is None else by.bias, "out": out, **route, **sizes},
        },
        {
            **{"SHARE": share, "ROW_BYTES": coded.row_bytes(by.weights)},
            **{"BM": tile.rows, "BN": tile.columns, "BK": coded.depth(by.scheme, tile.depth)},
            "ROWS": coded.rows_kind(by.scheme),
            **coded.layout(by.scheme.weight),
            "BIAS": by.bias is not None,
        },
        tile.tuning,
    )


def _quantized(e: Emitter, x: Buffer, k: int, scheme: Scheme) -> tuple[Buffer, Buffer]:
    assert scheme.activations is not None
    grouped = scheme.activations.group > 0
    rows = e.rows(x)
    most = rows.count if isinstance(rows.count, int) else rows.count.evaluate(e.bounds)
    per_row = -(-k // scheme.activations.group) if grouped else 1
    codes = e.scratch("moe.codes", most * k)
    scales = e.scratch("moe.scales", most * per_row * 4)
    quantized = Buffer.dense(codes, scheme.activations.codes.dtype, (rows.count, k))
    scale = Buffer.dense(scales, DType.F32, (rows.count, per_row))
    coded.quantize(e, rows, quantized, scale, grouped=grouped)
    return quantized, scale


def _gate(e: Emitter, node: Node, x: Buffer, out: Buffer, routes: _Routes, inner: int) -> None:
    act, limit = node.attrs["act"], node.attrs["limit"]
    alpha, shift = node.attrs["alpha"], node.attrs["shift"]
    assert isinstance(act, str) and isinstance(alpha, float) and isinstance(shift, float)
    bounded = limit if isinstance(limit, float) else 0.0
    block = min(1024, power_of_two(inner))
    e.launch(
        "experts.expert_gate",
        [routes.count, extent(inner, divisor=block)],
        {"x": x, "out": out, "alpha": alpha, "limit": bounded, "shift": shift},
        {
            **{"WIDTH": inner, "BLOCK": block, "ACT": act},
            **{"PLAIN": alpha == 1.0, "LIMIT": limit is not None},
        },
        Tuning(4 if block >= 512 else 1),
    )


def _scratch(e: Emitter, name: str, dtype: DType, routes: _Routes, width: int) -> Buffer:
    """A row for each route."""
    most = routes.count.evaluate(e.bounds)
    home = e.scratch(name, most * width * dtype.size_bytes)
    return Buffer.dense(home, dtype, (routes.count, width))


LOWERINGS: dict[str, Lowering] = {"moe": lower_moe, "scaled_moe": lower_scaled_moe}
