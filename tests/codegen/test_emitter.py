"""What a program's calls touch, and how much arena they take."""

from __future__ import annotations

import pytest

from infc.codegen.cpp.backend import emit_calls
from infc.codegen.cpp.calls import BARRIER, place_barriers
from infc.codegen.cpp.emitter import Emitter
from infc.codegen.cpp.roll import Loop, roll
from infc.ir.program import Operand, Value
from infc.ir.targets import resolve_target
from infc.ir.types import DType

from .op_cases import WIDTH, Case


def emitted(case: Case, result: Value) -> Emitter:
    case.b.outputs = [result]
    emitter = Emitter(case.b.build(), resolve_target("x86-64-v3"))
    emit_calls(emitter)
    return emitter


def _heads(c: Case, x: Value) -> Value:
    return c.op("reshape", c.op("slice", x, dim=1, start=1, stop=WIDTH), shape=("T", 4, 9))


@pytest.mark.parametrize("op", ["rms_norm", "layer_norm", "add_layer_norm", "linear", "rope"])
def test_a_call_waits_for_every_operand_that_was_computed(op: str) -> None:
    c = Case(DType.F32)
    # Behind this norm there is a barrier for x; only the operand made after it needs another.
    c.op("rms_norm", c.x, c.weight("first", WIDTH), eps=1e-5)
    made = c.op("exp", c.weight("made", WIDTH))
    angles = c.op("exp", c.op("embedding", c.weight("angles", 64, 3), c.positions))
    operands: dict[str, tuple[Operand, ...]] = {
        "rms_norm": (c.x, made),
        "layer_norm": (c.x, c.weight("w", WIDTH), made),
        "add_layer_norm": (c.x, c.x, c.weight("w", WIDTH), made),
        "linear": (c.x, c.weight("matrix", WIDTH, WIDTH), made),
        "rope": (_heads(c, c.x), angles, angles),
    }
    attrs: dict[str, dict[str, object]] = {"rope": {"style": "half", "rotary_dim": 6}, "linear": {}}
    node = c.b.add(op, operands[op], attrs.get(op, {"eps": 1e-5}))
    calls = place_barriers(emitted(c, node.outputs[0]).calls)
    comments = [call.comment for call in calls]
    between = calls[comments.index("loop: exp") : len(comments) - comments[::-1].index(op)]
    assert BARRIER in between


def test_scratch_does_not_grow_with_the_layers() -> None:
    sizes = []
    for layers in (1, 3):
        c = Case(DType.F32)
        y = c.x
        for _ in range(layers):
            scores = c.op("softmax", c.op("linear", y, c.weight("router", 8, WIDTH)), dim=-1)
            weight, index = c.two("topk", scores, k=2)
            experts = (c.weight("gate_up", 8, 22, WIDTH), c.weight("down", 8, WIDTH, 11))
            y = c.op("moe", y, index, weight, *experts, act="silu")
        outputs = sum(v.type.num_bytes({"T": 64}) for n in c.b.nodes for v in n.outputs)
        sizes.append(emitted(c, y).arena_bytes - outputs)
    # What is left beside the nodes' own results, each at a multiple of 64 bytes.
    assert abs(sizes[1] - sizes[0]) < 64 * 20


def test_equal_layers_of_generated_loops_become_one() -> None:
    c = Case(DType.F32)
    y = c.x
    for layer in range(6):
        y = c.op("linear", c.op("tanh", y), c.weight(f"w{layer}", WIDTH, WIDTH))
        y = c.op("mul", c.op("sigmoid", y), c.op("sum", y, dims=(1,), keepdim=True))
    items = roll(place_barriers(emitted(c, y).calls))
    assert [item.count for item in items if isinstance(item, Loop)] == [6]


def test_experts_between_dense_layers_become_one_loop() -> None:
    c = Case(DType.F32)
    y = c.x
    for layer in range(4):
        both = c.op("linear", y, c.weight(f"both{layer}", 22, WIDTH))
        gated = c.op("gated_act", both, act="silu")
        y = c.op("linear", gated, c.weight(f"out{layer}", WIDTH, 11))
        weight, index = c.two("topk", c.op("linear", y, c.weight(f"router{layer}", 8, WIDTH)), k=2)
        experts = (c.weight(f"up{layer}", 8, 22, WIDTH), c.weight(f"down{layer}", 8, WIDTH, 11))
        biases = (c.weight(f"up_bias{layer}", 8, 22), c.weight(f"down_bias{layer}", 8, WIDTH))
        y = c.op("moe", y, index, weight, *experts, *biases, act="silu", limit=7.0)
    items = roll(place_barriers(emitted(c, y).calls))
    (loop,) = (item for item in items if isinstance(item, Loop))
    assert loop.count == 4
    assert [call.comment for call in loop.body].count("moe") == 1
