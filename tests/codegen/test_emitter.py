"""What a program's calls touch, and how much arena they take."""

from __future__ import annotations

from infc.codegen.cpp.backend import emit_calls
from infc.codegen.cpp.emitter import Emitter
from infc.ir.program import Value
from infc.ir.target import resolve_target
from infc.ir.types import DType

from .test_cpp_ops import WIDTH, Case


def emitted(case: Case, result: Value) -> Emitter:
    case.b.outputs = [result]
    emitter = Emitter(case.b.build(), resolve_target("x86-64-v3"))
    emit_calls(emitter)
    return emitter


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
