"""Rows quantised to 8 bits, and products by packed matrices of codes."""

from __future__ import annotations

from collections.abc import Sequence

from ....ir.program import Node, Operand, WeightRef
from ....ir.schemes import get_scheme
from ..buffers import Buffer, codes_type
from ..calls import Arg, Panels, WeightPtr
from ..emitter import Emitter, Lowering, Rows, pointer


def lower_quantize_rows(e: Emitter, node: Node) -> None:
    """`quantize_rows(x)` → codes, and one scale for each row or group of its elements."""
    x = e.rows(node.inputs[0])
    kernel = "quantize_row_groups" if node.attrs["group"] else "quantize_rows"
    codes, scale = (e.output(value) for value in node.outputs)
    e.call(
        kernel,
        (x.pointer, x.stride, pointer(codes), pointer(scale), x.count, x.length),
        reads=(x.buffer,),
        writes=(codes, scale),
        comment=node.op,
        rows=x.count if x.stride != "0" else "",
    )


def lower_scaled_linear(e: Emitter, node: Node) -> None:
    """`scaled_linear(x, x_scale, w, w_scale, bias?)`: codes against the packed codes."""
    x, row_scale = e.rows(node.inputs[0]), e.dense(e.buffer(node.inputs[1]))
    _product(e, node, x, [row_scale], node.inputs[2:], ())


def lower_decoded_linear(e: Emitter, node: Node) -> None:
    """`decoded_linear(x, w, w_scale, bias?)`: rows as they are against the packed codes."""
    x = e.rows(node.inputs[0])
    _product(e, node, x, [], node.inputs[1:], (x.buffer.ctype,))


def _product(
    e: Emitter,
    node: Node,
    x: Rows,
    row_scales: list[Buffer],
    operands: Sequence[Operand],
    row_types: tuple[str, ...],
) -> None:
    """One call; `operands` are codes, scales and perhaps a bias."""
    weight, *others = operands
    assert isinstance(weight, WeightRef), "supports() takes a product by a weight only"
    scale, *bias = (e.dense(e.buffer(operand)) for operand in others)
    out = e.output(node.output)
    y = e.rows(out)
    address: Arg = pointer(bias[0]) if bias else "nullptr"
    scheme = get_scheme(node.attrs["scheme"])
    codes = codes_type(scheme)
    e.need_product_scratch(codes, x.length)
    packed = WeightPtr("char", e.weights.packed(weight.name, scheme.weight))
    e.call(
        e.apart(node.op, codes, *row_types, out.ctype, bias[0].ctype if bias else out.ctype),
        (
            *(x.pointer, x.stride, *map(pointer, row_scales), packed, pointer(scale), address),
            *(y.pointer, y.stride, x.count, y.length, x.length),
        ),
        reads=(x.buffer, *row_scales, scale, *bias),
        writes=(out,),
        comment=node.op,
        panels=Panels(codes, packed, y.length, x.length),
    )


LOWERINGS: dict[str, Lowering] = {
    "quantize_rows": lower_quantize_rows,
    "scaled_linear": lower_scaled_linear,
    "decoded_linear": lower_decoded_linear,
}
