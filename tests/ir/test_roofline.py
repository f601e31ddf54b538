"""The roofline: what a node must fetch and compute, counted apart from what caches hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.ir.analyses import node_cost, node_label
from infc.ir.builder import ProgramBuilder
from infc.ir.cost import OPERATION_KINDS, Cost, OperationKind
from infc.ir.ops import get_op
from infc.ir.program import Node, Program
from infc.ir.roofline import Ceilings, Roofline, StepShape, uncached_cost
from infc.ir.types import DType, Sym, TensorType

from ..runtime.small_artifact import HEADS, HIDDEN, SIZE, WINDOW, make_program

VOCAB = 300
PROGRAM = make_program(VOCAB)
UNIT = Ceilings(threads=1, read=1e3, fp32=2e3, bf16=3e3, int8=4e3)
TOKEN_BYTES = 2 * HEADS * SIZE * 4

sequences = st.lists(
    st.integers(1, 8).flatmap(lambda q: st.tuples(st.just(q), st.integers(q, 90))),
    min_size=1,
    max_size=6,
)


def nodes(op: str) -> list[Node]:
    return [node for node in PROGRAM.nodes if node.op == op]


def moved(node: Node, shape: StepShape) -> int:
    cost = uncached_cost(PROGRAM, node, shape)
    return cost.bytes_read + cost.bytes_written


def seconds(node: Node, shape: StepShape) -> float:
    return UNIT.seconds(uncached_cost(PROGRAM, node, shape))


def test_a_product_fetches_its_weights_once_and_nothing_else() -> None:
    shape = StepShape.of([(5, 9), (1, 30)])
    linear = nodes("linear")[0]
    asked = uncached_cost(PROGRAM, linear, shape)
    assert asked == Cost(HIDDEN * HIDDEN * 4, 0, 2 * 6 * HIDDEN * HIDDEN)
    head = uncached_cost(PROGRAM, nodes("linear")[-1], shape)
    assert head == Cost(VOCAB * HIDDEN * 4, 0, 2 * 2 * VOCAB * HIDDEN)


def test_what_nodes_hand_on_is_no_memory() -> None:
    shape = StepShape.of([(8, 8)])
    assert {moved(node, shape) for node in nodes("add")} == {0}
    assert {seconds(node, shape) for node in nodes("reshape")} == {0}
    # Of a table only the rows picked.
    assert moved(nodes("embedding")[0], shape) == 8 * HIDDEN * 4


def test_each_sequence_reads_what_it_can_see() -> None:
    full, windowed = nodes("paged_attention")
    shape = StepShape.of([(1, 40), (1, 40), (3, 10)])
    assert moved(full, shape) == (40 + 40 + 10) * TOKEN_BYTES
    seen = 2 * WINDOW + (WINDOW + 3 - 1)
    assert moved(windowed, shape) == seen * TOKEN_BYTES
    pairs = 40 + 40 + (8 + 9 + 10)
    products, results = pairs * 4 * HEADS * SIZE, 5 * HEADS * SIZE
    assert uncached_cost(PROGRAM, full, shape).flops == products + results
    assert moved(nodes("kv_write")[0], shape) == 5 * TOKEN_BYTES


@given(sequences)
def test_equal_layers_are_counted_once_and_summed(parts: list[tuple[int, int]]) -> None:
    shape = StepShape.of(parts)
    assert (shape.tokens, shape.rows) == (sum(q for q, _ in parts), len(parts))
    each = {node_label(node): seconds(node, shape) for node in PROGRAM.nodes}
    roofline = Roofline(PROGRAM, UNIT)
    assert roofline.node_seconds(shape) == each
    assert roofline.step_seconds(shape) == pytest.approx(sum(each.values()))


@given(sequences, st.integers(1, 8))
def test_more_work_never_takes_less(parts: list[tuple[int, int]], queries: int) -> None:
    roofline = Roofline(PROGRAM, UNIT)
    before = roofline.step_seconds(StepShape.of(parts))
    assert roofline.step_seconds(StepShape.of([*parts, (queries, 50)])) >= before


def test_the_slower_of_memory_and_processor() -> None:
    assert UNIT.seconds(Cost(600, 400, 10)) == 1
    assert UNIT.seconds(Cost(10, 0, 8000).of_kind("int8")) == 2


def test_operations_of_each_kind_take_their_own_time() -> None:
    both = Cost(1, 2, 4000).of_kind("int8") + Cost(3, 4, 2000) + Cost(0, 0, 3000).of_kind("bf16")
    assert (both.bytes_read, both.bytes_written, both.flops) == (4, 6, 9000)
    assert [both.operations(kind) for kind in OPERATION_KINDS] == [2000, 3000, 4000]
    assert UNIT.seconds(both) == 3
    assert both.times(2) == both + both


def product(dtype: DType, op: str) -> tuple[Program, Node]:
    b = ProgramBuilder("p", phase="planned")
    b.symbol("T", 1, 8)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
    x = b.emit("embedding", b.weight("table", TensorType(dtype, (9, 8))), ids)
    if op == "scaled_linear":
        codes, scale = b.add("quantize_rows", (x,), {}).outputs
        w = b.weight("w", TensorType(DType.I8, (4, 8)))
        w_scale = b.weight("s", TensorType(DType.F32, (4,)))
        b.emit(op, codes, scale, w, w_scale, dtype=dtype.value, scheme="int8-token")
    elif op == "decoded_linear":
        w = b.weight("w", TensorType(DType.U8, (4, 33)))
        w_scale = b.weight("s", TensorType(DType.F32, (4,)))
        b.emit(op, x, w, w_scale, dtype=dtype.value, scheme="int8-weights")
    elif op == "linear":
        b.emit(op, x, b.weight("w", TensorType(dtype, (4, 8))))
    else:
        b.emit(op, x)
    program = b.build()
    return program, program.nodes[-1]


@pytest.mark.parametrize(
    ("dtype", "op", "kind"),
    [
        (DType.F32, "linear", "fp32"),
        (DType.BF16, "linear", "bf16"),
        (DType.BF16, "scaled_linear", "int8"),
        (DType.BF16, "decoded_linear", "fp32"),
        (DType.BF16, "exp", "fp32"),
    ],
)
def test_what_is_multiplied(dtype: DType, op: str, kind: OperationKind) -> None:
    program, node = product(dtype, op)
    types = [program.operand_type(operand) for operand in node.inputs]
    assert get_op(op).operation_kind(types, node.attrs) == kind
    cost = node_cost(program, node, {"T": 3})
    assert cost.flops == sum(cost.operations(one) for one in OPERATION_KINDS)
    assert cost.operations(kind) == cost.flops > 0
