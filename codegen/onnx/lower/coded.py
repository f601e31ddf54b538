"""Products by matrices of codes, and rows that are quantized as they come.

Grouped codes are a blocked `DequantizeLinear` of `[K, N]` in front of a `MatMul`, which onnxruntime
makes one product of 4 or 8 bits of, and which TensorRT builds. Codes with one scale for each row
are multiplied as integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from ....ir.ops.base import int_attr
from ....ir.program import Node, Operand, WeightRef
from ....ir.rounding import LARGEST_I8, TINY
from ....ir.schemes import Scheme, get_scheme
from ....ir.types import Dim, DType, Sym
from ..emitter import Emitter, Lowering
from ..layouts import CodedMatrix
from ..types import STORED


def _quantize_rows(emitter: Emitter, node: Node) -> None:
    (operand,), group = node.inputs, int_attr(node.attrs, "group")
    lead, depth = emitter.type_of(operand).shape[:-1], emitter.fixed(operand, -1)
    emitter.give(node, *quantized(emitter, emitter.operand(operand), lead, depth, group))


def quantized(
    emitter: Emitter, x: str, lead: Sequence[Dim], depth: int, group: int
) -> tuple[str, str]:
    """Codes and scales of rows x `[*lead, depth]`, in groups if `group` is not 0."""
    graph, rank = emitter.graph, len(lead) + 1
    if not group:
        return _codes(emitter, x)
    groups = -(-depth // group)
    if depth % group:
        ends = [0] * (2 * rank - 1) + [groups * group - depth]
        x = graph.op("Pad", [x, graph.const(ends)])
    x = graph.op("Reshape", [x, emitter.shape((*map(str, lead), groups, group))])
    codes, scales = _codes(emitter, x)
    codes = graph.op("Reshape", [codes, emitter.shape((*map(str, lead), groups * group))])
    if depth % group:
        edges = ([0], [depth], [rank - 1])
        codes = graph.op("Slice", [codes, *map(graph.const, edges)])
    return codes, scales


def _codes(emitter: Emitter, x: str) -> tuple[str, str]:
    """Codes and scales of the rows of x, by the operations of `quantize_i8` in their order."""
    graph = emitter.graph

    def number(value: float) -> str:
        return graph.const(value, DType.F32)

    top = graph.op("ReduceMax", [graph.op("Abs", [x]), graph.const([-1])], keepdims=1)
    is_zero = graph.op("Less", [top, number(TINY)])  # no NaN is: it shows in the scale
    safe = graph.op("Where", [is_zero, number(1.0), top])
    inverse = graph.op("Div", [number(LARGEST_I8), safe])
    inverse = graph.op("Where", [is_zero, number(0.0), inverse])
    rounded = graph.op("Round", [graph.op("Mul", [x, inverse])])
    rounded = graph.op("Clip", [rounded, number(-LARGEST_I8), number(LARGEST_I8)])
    codes = graph.op("Cast", [rounded], to=STORED[DType.I8])
    scale = graph.op("Div", [top, number(LARGEST_I8)])
    scale = graph.op("Where", [is_zero, number(0.0), scale])
    return codes, graph.op("Squeeze", [scale, graph.const([-1])])


def matrix_of(emitter: Emitter, codes: Operand, scales: Operand, node: Node) -> CodedMatrix:
    """The matrix that a node multiplies by, or looks rows up in."""
    assert isinstance(codes, WeightRef)
    assert isinstance(scales, WeightRef)
    weights, scheme = emitter.program.weights, get_scheme(node.attrs["scheme"])
    depth = emitter.fixed(node.inputs[0], -1) if node.op != "scaled_embedding" else None
    width = int_attr(node.attrs, "width") if depth is None else depth
    return CodedMatrix(weights[codes.name], weights[scales.name], scheme.weight, width)


def _scaled_linear(emitter: Emitter, node: Node) -> None:
    x, x_scale, codes, scales, *biases = node.inputs
    scheme, matrix = get_scheme(node.attrs["scheme"]), matrix_of(emitter, codes, scales, node)
    parts = emitter.operand(x), emitter.operand(x_scale)
    finish(emitter, node, _scaled(emitter, *parts, matrix, scheme), biases)


def _scaled(emitter: Emitter, rows: str, scale: str, matrix: CodedMatrix, scheme: Scheme) -> str:
    """Rows that were quantized by a matrix of codes."""
    graph = emitter.graph
    if scheme.activations is not None and scheme.activations.group:
        wide = graph.op("Cast", [rows], to=STORED[DType.F32])
        each = np.arange(matrix.depth) // scheme.activations.group
        spread = graph.op("Gather", [scale, graph.const(each)], axis=-1)
        return _dequantized(emitter, graph.op("Mul", [wide, spread]), matrix, scheme)
    column = graph.op("Unsqueeze", [scale, graph.const([-1])])
    if matrix.form.is_grouped:
        wide = graph.op("Cast", [rows], to=STORED[DType.F32])
        return graph.op("Mul", [_dequantized(emitter, wide, matrix, scheme), column])
    sums = graph.op("MatMulInteger", [rows, emitter.store(matrix.columns())])
    sums = graph.op("Cast", [sums], to=STORED[DType.F32])
    # One after the other: onnxruntime 1.32 takes a product of both, in front of a bias, for that of
    # one scale for all rows, and gives wrong numbers.
    sums = graph.op("Mul", [sums, column])
    return graph.op("Mul", [sums, emitter.store(matrix.row_scales())])


def product(emitter: Emitter, x: str, matrix: CodedMatrix, scheme: Scheme) -> str:
    """Rows x `[T, K]` by a matrix of codes, quantized before if the scheme says so."""
    how = scheme.activations
    if how is None:
        return _dequantized(emitter, x, matrix, scheme)
    parts = quantized(emitter, x, (Sym("T"),), matrix.depth, how.group)
    return _scaled(emitter, *parts, matrix, scheme)


def _decoded_linear(emitter: Emitter, node: Node) -> None:
    x, codes, scales, *biases = node.inputs
    scheme, matrix = get_scheme(node.attrs["scheme"]), matrix_of(emitter, codes, scales, node)
    result = _dequantized(emitter, emitter.operand(x), matrix, scheme)
    finish(emitter, node, result, biases)


def _dequantized(emitter: Emitter, x: str, matrix: CodedMatrix, scheme: Scheme) -> str:
    """x by the numbers that grouped codes stand for."""
    graph = emitter.graph
    parts = emitter.store(matrix.columns()), emitter.store(matrix.column_scales())
    group = matrix.form.group
    numbers = graph.op("DequantizeLinear", parts, axis=0, block_size=group)
    rows = scheme.activations
    # Rows of codes in groups lose nothing where the product makes codes of them again.
    emitter.exact_rows |= rows is None or rows.group != group
    # In a shape that onnxruntime does not derive: it would first make one op of a product and the
    # bias or residual that is added to it, and then no product of codes of the two before.
    return graph.reshape(graph.op("MatMul", [x, numbers]), [-1, matrix.rows])


def finish(emitter: Emitter, node: Node, result: str, biases: list[Operand]) -> None:
    """The result of a product is this, plus the bias."""
    for bias in biases:
        result = emitter.graph.op("Add", [result, emitter.operand(bias)])
    emitter.give(node, result)


def _scaled_embedding(emitter: Emitter, node: Node) -> None:
    """Rows of bytes: the table is stored once more if it is the head as well."""
    graph = emitter.graph
    codes, scales, ids = node.inputs
    matrix, index = matrix_of(emitter, codes, scales, node), emitter.operand(ids)
    rows = graph.op("Gather", [emitter.store(matrix.lines()), index], axis=0)
    rows = graph.op("Cast", [rows], to=STORED[DType.F32])
    if matrix.form.is_grouped:
        scale = graph.op("Gather", [emitter.store(matrix.line_scales()), index], axis=0)
        each = np.arange(matrix.depth) // matrix.form.group
        scale = graph.op("Gather", [scale, graph.const(each)], axis=-1)
    else:
        scale = graph.op("Gather", [emitter.operand(scales), index], axis=0)
        scale = graph.op("Unsqueeze", [scale, graph.const([-1])])
    emitter.give(node, graph.op("Mul", [rows, scale]))


LOWERINGS: Final[dict[str, Lowering]] = {
    "quantize_rows": _quantize_rows,
    "scaled_linear": _scaled_linear,
    "decoded_linear": _decoded_linear,
    "scaled_embedding": _scaled_embedding,
}
