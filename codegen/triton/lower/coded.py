"""Rows quantised to 8 bits, and products by matrices of codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from ....ir.e4m3 import E4M3_LEVELS
from ....ir.formats import BOOK_I4, CENTERED_I4, CHUNK, COUNTED_I4, Format
from ....ir.program import Node, Operand
from ....ir.row_codes import E4M3_ROWS
from ....ir.schemes import Scheme, get_scheme
from ....ir.targets import CUDA
from ....ir.types import Dim, DType
from ..buffers import Buffer, product
from ..calls import Constant, Passed, Tuning, Typed, extent
from ..configurations import LinearTile, coded_tile
from ..emitter import Emitter, Lowering, Rows, power_of_two, whole
from .matrix import activated
from .norms import row_tuning

_GROUPS_OF_PART = 16
_E4M3_CAPABILITY = 89
"""From which on tensor cores multiply e4m3."""


def lower_quantize_rows(e: Emitter, node: Node) -> None:
    """`quantize_rows(x)` → codes, and one scale for each row or group of its elements."""
    codes, scale = (e.output(value) for value in node.outputs)
    quantize(e, e.rows(node.inputs[0]), codes, scale, grouped=bool(node.attrs["group"]))


def quantize(e: Emitter, x: Rows, codes: Buffer, scale: Buffer, *, grouped: bool) -> None:
    """Codes of rows, with a scale for each row or for each group of its elements.

    Unsigned ones are those of e4m3.
    """
    passed: dict[str, Passed | Buffer] = {"x": x.typed, "codes": codes, "scales": scale}
    if codes.dtype is DType.U8:
        group = E4M3_ROWS.group if grouped else x.length
        groups, block = -(-x.length // group), power_of_two(group)
        constants = {"STRIDE": x.stride, "WIDTH": x.length, "GROUP": group, "GROUPS": groups}
        grid: list[Dim] = [x.count, groups]
        e.launch(
            "e4m3.quantize_e4m3", grid, passed, {**constants, "BLOCK": block}, row_tuning(block)
        )
        return
    if not grouped:
        block = power_of_two(x.length)
        constants = {"STRIDE": x.stride, "WIDTH": x.length, "BLOCK": block}
        e.launch("coded.quantize_rows", [x.count], passed, constants, row_tuning(block))
        return
    groups = -(-x.length // CHUNK)
    part = min(_GROUPS_OF_PART, power_of_two(groups))
    e.launch(
        "coded.quantize_groups",
        [x.count, extent(groups, divisor=part)],
        passed,
        {"STRIDE": x.stride, "WIDTH": x.length, "GROUPS": groups, "PART": part},
        Tuning(1),
    )


def lower_coded_linear(e: Emitter, node: Node) -> None:
    """`scaled_linear(x, x_scale, w, w_scale, bias?)` of codes of rows, or `decoded_linear(x, w,
    w_scale, bias?)` of rows as they are."""
    product_by_codes(e, node, e.rows(node.inputs[0]), e.output(node.output))


def product_by_codes(e: Emitter, node: Node, x: Rows, out: Buffer, act: Node | None = None) -> None:
    """A product by codes that is rounded to its type, then may go through an activation."""
    w, w_scale, *bias = (e.dense(e.buffer(operand)) for operand in weights_of(node))
    x_scale = e.dense(e.buffer(node.inputs[1])) if node.op == "scaled_linear" else w_scale
    n, gated = whole(out.shape[-1], "a row"), act is not None and act.op == "gated_act"
    scheme = get_scheme(node.attrs["scheme"])
    tile = coded_tile(e.target, rows=e.most(x.count))
    if gated:
        tile = replace(tile, columns=max(16, tile.columns // 2))
    name = "e4m3.e4m3_linear" if scheme.is_fp8 else "coded.coded_linear"
    how = e4m3_tile(e, scheme, tile) if scheme.is_fp8 else _coded_tile(w, scheme, tile)
    e.launch(
        name,
        [extent(n, divisor=tile.columns), extent(x.count, divisor=tile.rows)],
        {
            **{"x": x.typed, "x_scale": x_scale},
            **({"codes": w} if scheme.is_fp8 else addresses(w)),
            **{"w_scale": w_scale, "bias": bias[0] if bias else w_scale, "out": out},
            **{"M": extent(x.count), "N": n, "K": x.length, "x_stride": x.stride},
        },
        {**how, "BIAS": bool(bias), "GATED": gated, **activated(node, act)},
        tile.tuning,
    )


def weights_of(node: Node) -> Sequence[Operand]:
    """The matrix of a product, then its scales where it has some, and its bias."""
    return node.inputs[2:] if node.op == "scaled_linear" else node.inputs[1:]


def _coded_tile(w: Buffer, scheme: Scheme, tile: LinearTile) -> dict[str, Constant]:
    return {
        "ROW_BYTES": row_bytes(w),
        **{"BM": tile.rows, "BN": tile.columns, "BK": depth(scheme, tile.depth)},
        "ROWS": rows_kind(scheme),
        **layout(scheme.weight),
    }


def lower_scaled_embedding(e: Emitter, node: Node) -> None:
    """`scaled_embedding(table, table_scale, ids)`."""
    table, scale, ids = (e.dense(e.buffer(operand)) for operand in node.inputs)
    out = e.output(node.output)
    width = node.attrs["width"]
    assert isinstance(width, int)
    block = min(1024, power_of_two(width))
    scheme = get_scheme(node.attrs["scheme"])
    if scheme.is_fp8:
        e.launch(
            "e4m3.e4m3_rows",
            [product(ids.shape), extent(width, divisor=block)],
            {"codes": table, "w_scale": scale, "ids": ids, "out": out},
            {"WIDTH": width, "BLOCK": block, "TILE": scheme.weight.tile},
            row_tuning(block),
        )
        return
    e.launch(
        "coded.coded_rows",
        [product(ids.shape), extent(width, divisor=block)],
        {**addresses(table), "w_scale": scale, "ids": ids, "out": out},
        {
            **{"ROW_BYTES": row_bytes(table), "WIDTH": width, "BLOCK": block},
            **layout(scheme.weight),
        },
        row_tuning(block),
    )


def e4m3_tile(e: Emitter, scheme: Scheme, tile: LinearTile) -> dict[str, Constant]:
    """How a product by e4m3 is cut and scaled, and whether the target multiplies such numbers."""
    return {
        **{"BM": tile.rows, "BN": tile.columns, "BK": tile.depth},
        **{"CODED": scheme.activations is not None, "TILE": scheme.weight.tile},
        "NATIVE": CUDA.capability(e.target.name) >= _E4M3_CAPABILITY,
    }


def addresses(w: Buffer) -> dict[str, Typed]:
    """Codes as bytes, and as halves of which some are scales."""
    return {"codes": Typed(w.pointer, "i8"), "halves": Typed(w.pointer, "fp16")}


def row_bytes(w: Buffer) -> int:
    """Bytes of a row of codes."""
    return whole(w.shape[-1], "a row of codes")


def depth(scheme: Scheme, most: int) -> int:
    """Elements of K at a time: what has scales of groups is summed by chunks."""
    return most if scheme.is_exact else CHUNK


def rows_kind(scheme: Scheme) -> str:
    """What the rows are that a scheme multiplies by, as the kernels call it."""
    if scheme.activations is None:
        return "float"
    return "exact" if scheme.is_exact else "groups"


def has_kernels(form: Format) -> bool:
    """Whether there are kernels for matrices in a format."""
    return form.levels == E4M3_LEVELS or (form.levels in _LEVELS and not form.tile)


_LEVELS: Final[Mapping[tuple[float, ...], str]] = {
    CENTERED_I4: "centered",
    BOOK_I4: "book",
    COUNTED_I4: "counted",
    (): "plain",
}
_SCALES: Final = {None: "none", DType.I8: "i8", DType.F16: "f16"}


def layout(form: Format) -> dict[str, Constant]:
    """How a row of codes lies."""
    return {
        "BITS": form.bits,
        "LEVELS": _LEVELS[form.levels],
        "SCALE": _SCALES[form.scale],
        "MINIMUM": form.minimum is not None,
        "GROUP": form.group,
        "BLOCK_BYTES": form.block_bytes,
        "CODES": form.part("codes").offset,
    }


LOWERINGS: dict[str, Lowering] = {
    "quantize_rows": lower_quantize_rows,
    "scaled_linear": lower_coded_linear,
    "decoded_linear": lower_coded_linear,
    "scaled_embedding": lower_scaled_embedding,
}
