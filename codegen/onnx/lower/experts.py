"""Mixture of experts: every expert over every row, weighted by a matrix that is mostly zero.

ONNX has no op for it. All experts are computed, so that there is nothing to sort; an expert that a
row was not routed to is selected away, not multiplied by zero, as it may have overflowed. Experts
in floats are one product of stacked matrices; those in codes are products of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ....ir.program import Node, Operand, WeightRef
from ....ir.schemes import Scheme, get_scheme
from ....ir.types import DType
from ..emitter import Emitter, Lowering
from ..layouts import CodedMatrix
from ..types import STORED
from . import coded
from .pointwise import activate

Product = Callable[[Emitter, str, CodedMatrix, Scheme], str]
"""Rows `[T, K]` in float32 by a matrix of codes."""


def _moe(emitter: Emitter, node: Node) -> None:
    graph = emitter.graph
    x, index, weight, gate_up, down, *biases = node.inputs
    experts = emitter.fixed(gate_up, 0)
    rows = emitter.rows(x, emitter.type_of(gate_up).dtype)
    hidden = _product(emitter, rows, gate_up, biases[:1])  # [E, T, 2I]
    hidden = _gated(emitter, node, hidden)
    down_dtype = emitter.type_of(down).dtype
    if emitter.held_narrow(down_dtype):
        hidden = graph.op("Cast", [hidden], to=STORED[down_dtype])
    else:
        hidden = emitter.rounded(hidden, down_dtype)
    result = _product(emitter, hidden, down, biases[1:])  # [E, T, H]
    index_name, weight_name = emitter.operand(index), emitter.operand(weight)
    ids = graph.const([[[expert]] for expert in range(experts)])  # [E, 1, 1]
    chosen = graph.op("Equal", [graph.op("Unsqueeze", [index_name, graph.const([0])]), ids])
    share = graph.op("Where", [chosen, weight_name, graph.const(0.0, DType.F32)])  # [E, T, K]
    share = graph.op("ReduceSum", [share, graph.const([2])], keepdims=1)  # [E, T, 1]
    used = graph.op("Cast", [chosen], to=STORED[DType.I32])
    used = graph.op(
        "Cast", [graph.op("ReduceMax", [used, graph.const([2])])], to=STORED[DType.BOOL]
    )
    result = graph.op("Mul", [result, share])
    result = graph.op("Where", [used, result, graph.const(0.0, DType.F32)])
    emitter.give(node, graph.op("ReduceSum", [result, graph.const([0])], keepdims=0))


def scaled(product: Product) -> Lowering:
    """Experts in codes, one after the other: each matrix is a tensor of its own, so that products
    read its codes as they are."""

    def lower(emitter: Emitter, node: Node) -> None:
        graph, scheme = emitter.graph, get_scheme(node.attrs["scheme"])
        x, index, weight, gate_up, gate_up_scale, down, down_scale, *biases = node.inputs
        width = emitter.fixed(x, 1)
        inner = emitter.fixed(gate_up, 1) // 2
        names = emitter.operand(x), emitter.operand(index), emitter.operand(weight)
        total = ""
        for expert in range(emitter.fixed(gate_up, 0)):
            into = _expert(emitter, gate_up, gate_up_scale, width, scheme, expert)
            hidden = _biased(emitter, product(emitter, names[0], into, scheme), biases[:1], expert)
            hidden = emitter.rounded(_gated(emitter, node, hidden), emitter.type_of(x).dtype)
            out_of = _expert(emitter, down, down_scale, inner, scheme, expert)
            result = _biased(emitter, product(emitter, hidden, out_of, scheme), biases[1:], expert)
            part = _share(emitter, names[1], names[2], expert, result)
            total = graph.op("Add", [total, part]) if total else part  # none is kept for a sum
        emitter.give(node, total)

    return lower


def _expert(
    emitter: Emitter, codes: Operand, scales: Operand, depth: int, scheme: Scheme, expert: int
) -> CodedMatrix:
    assert isinstance(codes, WeightRef)
    assert isinstance(scales, WeightRef)
    weights = emitter.program.weights
    return CodedMatrix(weights[codes.name], weights[scales.name], scheme.weight, depth, expert)


def _biased(emitter: Emitter, x: str, bias: list[Operand], expert: int) -> str:
    """x `[T, N]` plus the bias of an expert, of biases `[E, N]`."""
    for one in bias:
        row = emitter.graph.op("Gather", [emitter.operand(one), emitter.graph.const(expert)])
        x = emitter.graph.op("Add", [x, row])
    return x


def _share(emitter: Emitter, index: str, weight: str, expert: int, result: str) -> str:
    """What an expert contributes to each row, `[T, H]`: zero where it was not chosen."""
    graph = emitter.graph
    chosen = graph.op("Equal", [index, graph.const(expert)])  # [T, K]
    share = graph.op("Where", [chosen, weight, graph.const(0.0, DType.F32)])
    share = graph.op("ReduceSum", [share, graph.const([1])], keepdims=1)
    used = graph.op("Cast", [chosen], to=STORED[DType.I32])
    used = graph.op("ReduceMax", [used, graph.const([1])], keepdims=1)
    used = graph.op("Cast", [used], to=STORED[DType.BOOL])
    return graph.op("Where", [used, graph.op("Mul", [result, share]), graph.const(0.0, DType.F32)])


def _product(emitter: Emitter, x: str, matrices: Operand, bias: list[Operand]) -> str:
    """x `[T, K]` or `[E, T, K]` by matrices `[E, N, K]`, plus biases `[E, N]`, in float32."""
    graph = emitter.graph
    turned = graph.op("Transpose", [emitter.matrix(matrices)], perm=[0, 2, 1])
    result = graph.op("MatMul", [x, turned])
    if emitter.held_narrow(dtype := emitter.type_of(matrices).dtype):
        result = emitter.widened(result, dtype)
    for one in bias:
        column = graph.op("Unsqueeze", [emitter.operand(one), graph.const([1])])
        result = graph.op("Add", [result, column])
    return result


def _gated(emitter: Emitter, node: Node, hidden: str) -> str:
    """act(gate) * (up + shift), each within the limit."""
    graph, alpha, limit = emitter.graph, node.attrs["alpha"], node.attrs["limit"]
    gate, up = graph.split(hidden, -1)
    if isinstance(limit, float):
        most, least = graph.const(limit, DType.F32), graph.const(-limit, DType.F32)
        gate, up = graph.op("Clip", [gate, "", most]), graph.op("Clip", [up, least, most])
    if alpha == 1:
        turned = activate(graph, gate, str(node.attrs["act"]))
    else:
        turned = graph.op("Swish", [gate], alpha=float(str(alpha)))
    if node.attrs["shift"]:
        up = graph.op("Add", [up, graph.const(node.attrs["shift"], DType.F32)])
    return graph.op("Mul", [turned, up])


LOWERINGS: Final[dict[str, Lowering]] = {"moe": _moe, "scaled_moe": scaled(coded.product)}
