"""Routed experts."""

from __future__ import annotations

from ....ir.formats import CHUNK, Format
from ....ir.program import Node, Operand, WeightRef
from ....ir.schemes import Scheme, get_scheme
from ....ir.types import Dim, DType
from ..buffers import CTYPES, Buffer, codes_type
from ..calls import Arg, Code, WeightPtr, braced
from ..emitter import Emitter, Lowering, pointer
from ..expressions import literal


def lower_moe(e: Emitter, node: Node) -> None:
    """`moe(x, index, weight, gate_up, down, gate_up_bias?, down_bias?)`: rows grouped by expert,
    summed in slot order."""
    gate_up, down = node.inputs[3:5]
    biases = [e.dense(e.buffer(operand)) for operand in node.inputs[5:7]]
    addresses: list[Arg] = [pointer(bias) for bias in biases] or ["nullptr", "nullptr"]
    weights = [_packed(e, gate_up), _packed(e, down), *addresses]
    _lower(e, node, "MoeWeights", gate_up, weights, biases)


def lower_scaled_moe(e: Emitter, node: Node) -> None:
    """`scaled_moe(x, index, weight, gate_up, gate_up_scale, down, down_scale, gate_up_bias?,
    down_bias?)`: the same over codes."""
    gate_up, down = node.inputs[3], node.inputs[5]
    scales = [e.dense(e.buffer(node.inputs[place])) for place in (4, 6)]
    biases = [e.dense(e.buffer(operand)) for operand in node.inputs[7:9]]
    addresses: list[Arg] = [pointer(bias) for bias in biases] or ["nullptr", "nullptr"]
    up_scale, down_scale = map(pointer, scales)
    scheme = get_scheme(node.attrs["scheme"])
    codes = _packed(e, gate_up, scheme.weight), _packed(e, down, scheme.weight)
    weights = [codes[0], up_scale, codes[1], down_scale, *addresses]
    _lower(e, node, "ScaledMoeWeights", gate_up, weights, [*scales, *biases], scheme)


def _packed(e: Emitter, operand: Operand, form: Format | None = None) -> Arg:
    assert isinstance(operand, WeightRef), "supports() takes experts that are weights only"
    return WeightPtr("char", e.weights.packed(operand.name, form))


def _lower(
    e: Emitter,
    node: Node,
    struct: str,
    gate_up: Operand,
    weights: list[Arg],
    others: list[Buffer],
    scheme: Scheme | None = None,
) -> None:
    """One call; `struct` is filled with `weights`, and `others` are the buffers among them."""
    x = e.rows(e.dense(e.buffer(node.inputs[0])))
    index, weight = (e.dense(e.buffer(operand)) for operand in node.inputs[1:3])
    assert isinstance(gate_up, WeightRef), "supports() takes experts that are weights only"
    experts, double_inner = _sizes(e.program.weights[gate_up.name].type.shape[:2])
    hidden = x.length
    (slots,) = _sizes(index.shape[-1:])
    out = e.output(node.output)
    inner = double_inner // 2
    parts = _scratch_parts(e, slots, experts, hidden, inner)
    kernel = node.op
    if scheme is not None and scheme.activations is None:
        kernel = "decoded_moe"
    elif scheme is not None:
        parts += _code_parts(e, slots, hidden, inner)
    scratch = e.scratch(sum(-(-part // 64) * 64 for part in parts))
    weight_type = e.program.weights[gate_up.name].type.dtype
    stored = CTYPES[weight_type] if scheme is None else codes_type(scheme)
    for depth in (hidden, inner):
        e.need_product_scratch(stored, depth)
    gate_type, gate = _gate(node)
    e.call(
        e.apart(kernel, stored, gate_type, out.ctype, index.ctype, weight.ctype),
        (
            *(gate, x.pointer, x.stride, pointer(index), pointer(weight)),
            *(braced(f"{struct}<{out.ctype}>", *weights), pointer(out), hidden),
            *(braced("MoeShape", x.count, experts, hidden, inner, slots), pointer(scratch)),
        ),
        reads=(x.buffer, index, weight, *others),
        writes=(out, scratch),
        comment=node.op,
    )


def _gate(node: Node) -> tuple[str, Code]:
    """The C++ type of what joins the halves of an expert's first product, and a value of it."""
    act, limit = node.attrs["act"], node.attrs["limit"]
    numbers = [node.attrs["alpha"], float("inf") if limit is None else limit, node.attrs["shift"]]
    if numbers == [1.0, float("inf"), 0.0]:
        plain = f"PlainGate<Act::{act}>"
        return plain, braced(plain)
    texts = [literal(n, DType.F32) for n in numbers if isinstance(n, float)]
    limited = f"LimitedGate<Act::{act}>"
    return limited, braced(limited, *texts)


def _sizes(shape: tuple[Dim, ...]) -> tuple[int, ...]:
    assert all(isinstance(dim, int) for dim in shape), "experts have fixed sizes"
    return tuple(dim for dim in shape if isinstance(dim, int))


def _scratch_parts(
    e: Emitter, slots: int, experts: int, hidden: int, inner: int
) -> tuple[int, ...]:
    """Bytes of each part of `MoeScratch` (`moe.hpp`) in float, at the most tokens of a step."""
    rows = e.program.symbols["T"].high * slots
    parts = (rows * hidden, rows * 2 * inner, rows * inner, rows, rows, experts + 1)
    return tuple(4 * part for part in parts)


def _code_parts(e: Emitter, slots: int, hidden: int, inner: int) -> tuple[int, ...]:
    """Bytes of what `ScaledMoeScratch` (`scaled_moe.hpp`) adds: codes and scales, twice."""
    tokens = e.program.symbols["T"].high
    scales = 4 * tokens * -(-hidden // CHUNK), 4 * tokens * slots * -(-inner // CHUNK)
    return (tokens * hidden, scales[0], tokens * slots * inner, scales[1])


LOWERINGS: dict[str, Lowering] = {"moe": lower_moe, "scaled_moe": lower_scaled_moe}
