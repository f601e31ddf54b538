"""Products by matrices of codes, as TensorRT multiplies them: in 16 bits, or in e4m3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
from onnx import TensorProto, numpy_helper

from ...ir.e4m3 import LARGEST_E4M3
from ...ir.formats import E4M3
from ...ir.ops.base import Attrs, int_attr
from ...ir.program import Node, Operand, Weight, WeightExpr, WeightRef
from ...ir.rounding import TINY
from ...ir.schemes import get_scheme
from ...ir.types import DType, TensorType
from ...ir.weights import WeightOp, register_weight_op
from ..onnx.emitter import Emitter, Lowering
from ..onnx.layouts import Stored
from ..onnx.lower.coded import finish, matrix_of
from ..onnx.types import STORED

if TYPE_CHECKING:
    import torch

_E4M3_TYPE: Final = TensorProto.FLOAT8E4M3FN
_ZERO: Final = "constant.e4m3.zero"


def product_type(emitter: Emitter) -> DType:
    """The type that numbers of codes are multiplied in: that of the cache, or bfloat16."""
    kinds = [DType(group.dtype) for group in emitter.program.resources]
    return next((kind for kind in kinds if emitter.held_narrow(kind)), DType.BF16)


def _decoded_linear(emitter: Emitter, node: Node) -> None:
    x, codes, scales, *biases = node.inputs
    scheme, narrow = get_scheme(node.attrs["scheme"]), product_type(emitter)
    graph = emitter.graph
    if scheme.weight is E4M3:
        rows = emitter.rows(x, DType.BF16)
        result = _by_e4m3(emitter, rows, codes, scales)
    else:
        matrix = matrix_of(emitter, codes, scales, node)
        scale = graph.op("Cast", [emitter.store(matrix.column_scales())], to=STORED[narrow])
        parts = emitter.store(matrix.columns()), scale
        numbers = graph.op("DequantizeLinear", parts, axis=0, block_size=matrix.form.group)
        result = graph.op("MatMul", [emitter.rows(x, narrow), numbers])
        result = emitter.widened(result, narrow)
    finish(emitter, node, result, biases)


def _quantize_rows(emitter: Emitter, node: Node) -> None:
    """Rows over their scales in float32: the product makes e4m3 of them, whose scale is one.

    The operations are those of `quantize_e4m3`, in their order.
    """
    graph, (operand,) = emitter.graph, node.inputs
    x = emitter.operand(operand)

    def number(value: float) -> str:
        return graph.const(value, DType.F32)

    top = graph.op("ReduceMax", [graph.op("Abs", [x]), graph.const([-1])], keepdims=1)
    is_zero = graph.op("Less", [top, number(TINY)])
    safe = graph.op("Where", [is_zero, number(1.0), top])
    inverse = graph.op("Div", [number(LARGEST_E4M3), safe])
    inverse = graph.op("Where", [is_zero, number(0.0), inverse])
    rows = graph.op("Mul", [x, inverse])
    rows = graph.op("Clip", [rows, number(-LARGEST_E4M3), number(LARGEST_E4M3)])
    scale = graph.op("Div", [top, number(LARGEST_E4M3)])
    scale = graph.op("Where", [is_zero, number(0.0), scale])
    emitter.give(node, rows, graph.op("Squeeze", [scale, graph.const([-1])]))


def _scaled_linear(emitter: Emitter, node: Node) -> None:
    graph = emitter.graph
    x, x_scale, codes, scales, *biases = node.inputs
    quantized = graph.op(
        "QuantizeLinear", [emitter.operand(x), graph.const(1.0, DType.F32), _zero(emitter)]
    )
    rows = graph.op("DequantizeLinear", [quantized, _one(emitter), _zero(emitter)])
    result = _by_e4m3(emitter, rows, codes, scales)
    column = graph.op("Unsqueeze", [emitter.operand(x_scale), graph.const([-1])])
    finish(emitter, node, graph.op("Mul", [result, column]), biases)


def _by_e4m3(emitter: Emitter, rows: str, codes: Operand, scales: Operand) -> str:
    """Rows in bfloat16 by a matrix of e4m3, in float32.

    Sums are bfloat16 whatever the model is in: those of two e4m3 do not fit in float16. Scales of
    weights are multiplied in float32 behind it.
    """
    graph = emitter.graph
    numbers = graph.op("DequantizeLinear", [emitter.store(_columns(emitter, codes)),
                                            _one(emitter), _zero(emitter)])  # fmt: skip
    result = emitter.widened(graph.op("MatMul", [rows, numbers]), DType.BF16)
    return graph.op("Mul", [result, emitter.operand(scales)])


def _one(emitter: Emitter) -> str:
    one = emitter.graph.const(1.0, DType.F32)
    return emitter.graph.op("Cast", [one], to=STORED[DType.BF16])


def _zero(emitter: Emitter) -> str:
    """The point of zero in e4m3, which says what type is made."""
    if all(tensor.name != _ZERO for tensor in emitter.graph.initializers):
        tensor = numpy_helper.from_array(np.zeros((), np.uint8), _ZERO)
        tensor.data_type = _E4M3_TYPE
        emitter.graph.initializers.append(tensor)
    return _ZERO


def _columns(emitter: Emitter, codes: Operand) -> Stored:
    """A matrix of e4m3 `[N, K]` as `[K, N]`."""
    assert isinstance(codes, WeightRef)
    source = emitter.program.weights[codes.name]
    rows, depth = source.type.shape
    assert isinstance(rows, int) and isinstance(depth, int)
    expr = WeightExpr(_TURNED.name, (source.expr,), {"depth": depth})
    kind = TensorType(DType.U8, (depth, rows))
    return Stored(Weight(f"{source.name}.by_column", kind, expr), (depth, rows), _E4M3_TYPE)


def _turned(parts: Sequence[torch.Tensor], attrs: Attrs) -> torch.Tensor:
    return parts[0].T.contiguous()


def _turned_type(kinds: Sequence[TensorType], attrs: Attrs) -> TensorType:
    rows, depth = kinds[0].shape[0], int_attr(attrs, "depth")
    return TensorType(DType.U8, (depth, rows))


_TURNED: Final = register_weight_op(WeightOp("e4m3_columns", _turned, _turned_type, ("depth",)))

LOWERINGS: Final[dict[str, Lowering]] = {
    "quantize_rows": _quantize_rows,
    "scaled_linear": _scaled_linear,
    "decoded_linear": _decoded_linear,
}
"""Those of ONNX for products of codes that TensorRT has other forms of."""
