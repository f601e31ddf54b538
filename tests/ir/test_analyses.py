"""The guards of capture find what they must, and let sound models through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from infc.ir.analyses import (
    check_mixer_per_layer,
    check_token_locality,
    depends_only_on,
    node_cost,
    total_cost,
)
from infc.ir.builder import ProgramBuilder
from infc.ir.errors import UnsupportedModelError
from infc.ir.ops import Cost
from infc.ir.program import ModelSpec, Program, Value
from infc.ir.types import DType, Sym, TensorType

T, R = Sym("T"), Sym("R")
SPEC = ModelSpec("toy", 2, 8, 2, 2, 4, 16, 64)
Plant = Callable[[ProgramBuilder, Value], Value]


def model(plant: Plant = lambda b, x: x, layers: tuple[int, ...] = (0, 1)) -> Program:
    """A toy model with MoE, rope and a unit batch; `plant` sits on layer 1's residual `[T, 8]`."""
    b = ProgramBuilder("toy", SPEC)
    b.symbol("T")
    b.symbol("R")
    f, i = DType.F32, DType.I64
    ids = b.input("input_ids", TensorType(i, (T,)))
    positions = b.input("positions", TensorType(i, (T,)))
    rows = b.input("logits_index", TensorType(i, (R,)))
    frequencies = b.weight("frequencies", TensorType(f, (2,)))
    cos, sin = (b.emit("rotary", positions, frequencies, function=name) for name in ("cos", "sin"))
    x = b.emit("embedding", b.weight("embed", TensorType(f, (16, 8))), ids)
    x = b.emit("reshape", b.emit("reshape", x, shape=(1, T, 8)), shape=(T, 8))
    for layer in layers:
        b.layer = layer
        heads = b.emit("reshape", x, shape=(T, 2, 4))
        heads = b.emit("rope", heads, cos, sin, rotary_dim=4)
        mixed = b.emit("attention", heads, heads, heads, layer=layer, scale=0.5)
        mixed = b.emit("reshape", mixed, shape=(T, 8))
        if layer == 1:
            mixed = plant(b, mixed)
        x = b.emit("add", x, mixed)
        values, index = b.add("topk", (b.emit("softmax", x, dim=1),), {"k": 2}).outputs
        experts = [
            b.weight(n, TensorType(f, s)) for n, s in (("up", (8, 8, 8)), ("down", (8, 8, 4)))
        ]
        x = b.emit("moe", x, index, values, *experts, act="silu")
    b.layer = None
    last = b.emit("take", b.emit("reshape", x, shape=(1, T, 8)), rows, dim=1)
    b.output(b.emit("linear", last, b.weight("head", TensorType(f, (16, 8)))))
    return b.build()


def complaint(check: Callable[[Program], None], program: Program) -> str | None:
    """What a guard says against a program."""
    try:
        check(program)
    except UnsupportedModelError as error:
        return str(error)
    return None


def test_a_sound_model_passes() -> None:
    assert complaint(check_mixer_per_layer, model()) is None
    assert complaint(check_token_locality, model()) is None


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ((0,), "layer 1 was captured with no attention op"),
        ((0, 0, 1), "layer 0 was captured with 2 attention ops"),
        ((0, 1, 2), "names layer 2 of 2"),
    ],
)
def test_each_layer_has_one_attention_op(layers: tuple[int, ...], match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        check_mixer_per_layer(model(layers=layers))


def test_attention_that_sees_the_future_is_refused() -> None:
    nodes = tuple(
        replace(node, attrs={**node.attrs, "causal": False}) if node.op == "attention" else node
        for node in model().nodes
    )
    with pytest.raises(UnsupportedModelError, match="attention of layer 0 is not causal"):
        check_mixer_per_layer(model().with_nodes(nodes))


def _short_convolution(b: ProgramBuilder, x: Value) -> Value:
    """As in lfm2: each token takes a share of the one before it."""
    head = b.emit("slice", x, dim=0, start=0, stop=1)
    tail = b.emit("slice", x, dim=0, start=0, stop=-1)
    return b.emit("add", x, b.emit("concat", head, tail, dim=0))


def _hand_written_attention(b: ProgramBuilder, x: Value) -> Value:
    scores = b.emit("matmul", x, b.emit("transpose", x, perm=(1, 0)))
    return b.emit("matmul", b.emit("softmax", scores, dim=1), x)


def _pairs(b: ProgramBuilder, x: Value) -> Value:
    column = b.emit("amax", x, dims=(1,), keepdim=True)
    row = b.emit("reshape", column, shape=(1, T))
    return b.emit("add", x, b.emit("amax", b.emit("sub", column, row), dims=(1,), keepdim=True))


def _shuffled(b: ProgramBuilder, x: Value) -> Value:
    flat = b.emit("reshape", b.emit("transpose", x, perm=(1, 0)), shape=("8*T",))
    return b.emit("reshape", flat, shape=(T, 8))


def _row_numbers(b: ProgramBuilder, x: Value) -> Value:
    count = b.emit("cast", b.emit("iota", size=T), dtype="f32")
    return b.emit("add", x, b.emit("reshape", count, shape=(T, 1)))


def _recurrence(b: ProgramBuilder, x: Value) -> Value:
    return b.emit("cumsum", x, dim=0)


def _mean_of_the_batch(b: ProgramBuilder, x: Value) -> Value:
    return b.emit("sub", x, b.emit("mean", x, dims=(0,), keepdim=True))


def _other_rows(b: ProgramBuilder, x: Value) -> Value:
    return b.emit("take", x, b.inputs[1], dim=0)


@pytest.mark.parametrize(
    ("plant", "match"),
    [
        (_short_convolution, "slice of layer 1 takes a part of the tokens"),
        (_hand_written_attention, "matmul of layer 1 pairs tokens with tokens"),
        (_pairs, "sub of layer 1 pairs tokens"),
        (_shuffled, "reshape of layer 1 reshapes .* across the token dimension"),
        (_row_numbers, "iota of layer 1 counts the rows"),
        (_recurrence, "cumsum of layer 1 combines elements along"),
        (_mean_of_the_batch, "mean of layer 1 combines"),
        (_other_rows, "take of layer 1 takes rows of other tokens"),
    ],
)
def test_mixing_tokens_is_refused_with_layer_and_op(plant: Plant, match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match) as caught:
        check_token_locality(model(plant))
    assert str(caught.value).startswith("toy, layer 1: ")


@pytest.mark.parametrize(
    "plant",
    [
        lambda b, x: b.emit("reshape", b.emit("reshape", x, shape=("2*T", 4)), shape=(T, 8)),
        lambda b, x: b.emit("transpose", b.emit("transpose", x, perm=(1, 0)), perm=(1, 0)),
        lambda b, x: b.emit("slice", x, dim=0, start=0, stop=None),
        lambda b, x: b.emit("softmax", x, dim=1),
        lambda b, x: b.emit("add", x, b.emit("full", shape=(T, 1), value=1.0, dtype="f32")),
    ],
)
def test_what_keeps_rows_apart_is_let_through(plant: Plant) -> None:
    assert complaint(check_token_locality, model(plant)) is None


def test_dependence_on_inputs() -> None:
    b = ProgramBuilder("p")
    b.symbol("T")
    kind = TensorType(DType.F32, (T,))
    x, y = b.input("x", kind), b.input("y", kind)
    from_x = b.emit("exp", x)
    constant = b.emit("full", shape=(T,), value=2.0, dtype="f32")
    both = b.emit("add", b.emit("mul", from_x, constant), y)
    b.output(both)
    program = b.build()
    assert depends_only_on(program, ["x"]) == {"0", "1", "2"}
    assert depends_only_on(program, []) == {constant.name}
    assert depends_only_on(program, ["x", "y"]) == {"0", "1", "2", both.name}


def test_costs_add_up() -> None:
    program = model()
    bindings = {"T": 5, "R": 1}
    parts = [node_cost(program, node, bindings) for node in program.nodes]
    total = total_cost(program, bindings)
    assert total == sum(parts, Cost())
    larger = total_cost(replace(program), {"T": 50, "R": 1})
    assert larger.flops > 5 * total.flops
    linear = next(n for n in program.nodes if n.op == "linear")
    assert node_cost(program, linear, bindings).flops == 2 * 16 * 8
