"""Matrix products over packed weights, and the gated activation that follows them."""

from __future__ import annotations

from ....ir.program import Node, WeightRef
from ..buffers import CTYPES
from ..calls import Arg, Panels, WeightPtr, c_dim
from ..emitter import Emitter, Lowering, pointer


def lower_linear(e: Emitter, node: Node) -> None:
    """`linear(x, w, bias?)`: every row of x against the packed weight."""
    x = e.rows(node.inputs[0])
    weight = node.inputs[1]
    assert isinstance(weight, WeightRef), "supports() takes linear over a weight only"
    out = e.output(node.output)
    y = e.rows(out)
    bias = [e.dense(e.buffer(operand)) for operand in node.inputs[2:]]
    address: Arg = pointer(bias[0]) if bias else "nullptr"
    weight_type = CTYPES[e.program.weights[weight.name].type.dtype]
    bias_type = bias[0].ctype if bias else out.ctype
    e.need_product_scratch(weight_type, x.length)
    packed = WeightPtr("char", e.weights.packed(weight.name))
    e.call(
        e.apart("linear", x.buffer.ctype, weight_type, out.ctype, bias_type),
        (
            *(x.pointer, x.stride, packed, address, y.pointer, y.stride),
            *(x.count, y.length, x.length),
        ),
        reads=(x.buffer, *bias),
        writes=(out,),
        comment=str(node.op),
        panels=Panels(weight_type, packed, y.length, x.length),
    )


def lower_gated_act(e: Emitter, node: Node) -> None:
    """`gated_act(gate_up)`: act(gate) * up, with gate in the first half of a row."""
    x = e.rows(node.inputs[0])
    out = e.output(node.output)
    inner = x.length // 2
    e.call(
        f"gated_act<Act::{node.attrs['act']}>",
        (x.pointer, x.stride, pointer(out), inner, x.count, inner),
        reads=(x.buffer,),
        writes=(out,),
        comment=node.op,
    )


def lower_matmul(e: Emitter, node: Node) -> None:
    """`matmul(a, b)` of two computed matrices: rare, so one plain loop nest."""
    a, b = e.buffer(node.inputs[0]), e.buffer(node.inputs[1])
    out = e.output(node.output)
    *batch, m, n = out.shape
    k = a.shape[-1]
    a = e.dense(a.expand((*batch, m, k)))
    b = e.dense(b.expand((*batch, k, n)))
    count = " * ".join(c_dim(d) for d in batch) or "1"
    e.call(
        "matmul_plain",
        (pointer(a), pointer(b), pointer(out), count, c_dim(m), c_dim(n), c_dim(k)),
        reads=(a, b),
        writes=(out,),
        comment=node.op,
    )


LOWERINGS: dict[str, Lowering] = {
    "linear": lower_linear,
    "gated_act": lower_gated_act,
    "matmul": lower_matmul,
}
