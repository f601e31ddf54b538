"""Rows quantised to 8 bits, and products of codes by packed matrices of codes."""

from __future__ import annotations

from ....ir.program import Node, WeightRef
from ....ir.schemes import get_scheme
from ..buffers import CODES
from ..calls import Arg, Panels, WeightPtr
from ..emitter import Emitter, Lowering, pointer


def lower_quantize_rows(e: Emitter, node: Node) -> None:
    """`quantize_rows(x)` → codes, and one scale for each row or group of its elements."""
    x = e.rows(node.inputs[0])
    kernel = "quantize_row_groups" if node.attrs["group"] else "quantize_rows"
    codes, scale = (e.output(value) for value in node.outputs)
    e.call(
        f"{kernel}(t, {{0}}, {x.stride}, {{1}}, {{2}}, {x.count}, {x.length});",
        (x.pointer, pointer(codes), pointer(scale)),
        reads=(x.buffer,),
        writes=(codes, scale),
        comment=node.op,
        rows=x.count if x.stride != "0" else "",
    )


def lower_scaled_linear(e: Emitter, node: Node) -> None:
    """`scaled_linear(x, x_scale, w, w_scale, bias?)`: codes against the packed codes."""
    x = e.rows(node.inputs[0])
    weight = node.inputs[2]
    assert isinstance(weight, WeightRef), "supports() takes a product by a weight only"
    row_scale, scale = (e.dense(e.buffer(node.inputs[place])) for place in (1, 3))
    bias = [e.dense(e.buffer(operand)) for operand in node.inputs[4:]]
    out = e.output(node.output)
    y = e.rows(out)
    address: Arg = pointer(bias[0]) if bias else "nullptr"
    scheme = get_scheme(node.attrs["scheme"])
    codes = CODES[scheme.name]
    e.need_product_scratch(codes, x.length)
    packed = WeightPtr("char", e.weights.packed(weight.name, scheme.weight))
    e.call(
        f"scaled_linear<{codes}, {out.ctype}>(t, {{0}}, {x.stride}, {{1}}, {{2}}, {{3}}, {{4}}, "
        f"{{5}}, {y.stride}, {x.count}, {y.length}, {x.length});",
        (
            *(x.pointer, pointer(row_scale)),
            *(packed, pointer(scale)),
            *(address, y.pointer),
        ),
        reads=(x.buffer, row_scale, scale, *bias),
        writes=(out,),
        comment=node.op,
        panels=Panels(codes, packed, y.length, x.length),
    )


LOWERINGS: dict[str, Lowering] = {
    "quantize_rows": lower_quantize_rows,
    "scaled_linear": lower_scaled_linear,
}
