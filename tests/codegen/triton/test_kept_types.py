"""Results in float32 that are kept in the type of the matrices which alone multiply them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from infc.codegen.triton import emitter
from infc.codegen.triton.emitter import Emitter, FormSpec
from infc.ir.builder import ProgramBuilder
from infc.ir.program import Program
from infc.ir.targets import resolve_target
from infc.ir.types import DType, Sym, TensorType
from infc.ir.weights import program_weights

from ..harness import Chunk, make_step, random_weights, with_weights
from .interpreting import Interpreting
from .running import Runner
from .test_launches import plan

SM_80 = resolve_target("sm_80")
"""Products have plain tiles there, whatever the type of their rows."""
WIDTH = 48


def program_of(readers: tuple[str, ...], *, matrix: DType = DType.BF16) -> Program:
    """An activation in float32 that is read by a product, and by others."""
    b = ProgramBuilder("kept", phase="planned")
    b.symbol("T", 1, 64)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
    x = b.emit("embedding", b.weight("table", TensorType(DType.F32, (WIDTH, WIDTH))), ids)
    y = b.emit("gelu", b.emit("add", x, 0.125), approximate="tanh")
    results = []
    for place, reader in enumerate(readers):
        if reader == "add":
            results.append(b.emit("add", y, x))
            continue
        rows = b.emit("reshape", y, shape=("T", 2, WIDTH // 2)) if reader == "views" else y
        rows = b.emit("reshape", rows, shape=("T", WIDTH)) if reader == "views" else rows
        w = b.weight(f"w{place}", TensorType(matrix, (WIDTH, WIDTH)))
        results.append(b.emit("linear", rows, w, dtype="f32"))
    total = results[0]
    for one in results[1:]:
        total = b.emit("add", total, one)
    b.outputs = [total]
    program = b.build()
    program = replace(program, spec=replace(program.spec, vocab_size=WIDTH))
    return with_weights(plan(program), random_weights(program, seed=2))


def kept(program: Program) -> DType:
    """The type in memory of what the activation gives."""
    e = Emitter(program, SM_80, FormSpec("mixed-64", False, 64))
    (node,) = (node for node in program.nodes if node.op == "gelu")
    return e.kept_type(node.output)


def test_only_what_products_of_16_bits_alone_read_is_narrower() -> None:
    assert kept(program_of(("linear",))) is DType.BF16
    assert kept(program_of(("linear", "views"))) is DType.BF16
    assert kept(program_of(("linear",), matrix=DType.F16)) is DType.F16
    assert kept(program_of(("linear", "add"))) is DType.F32
    assert kept(program_of(("linear",), matrix=DType.F32)) is DType.F32


@pytest.mark.parametrize("form", ["decode-16", "mixed-64"])
def test_the_bits_are_those_of_products_that_round(
    form: str, interpreting: Interpreting, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = program_of(("linear", "views"))
    ids = list(range(0, WIDTH, 7))
    step = make_step([Chunk([one], 0, [1]) for one in ids], num_groups=0, block_size=16)

    def logits() -> np.ndarray:
        runner = Runner(program, program_weights(program), interpreting, target=SM_80)
        return runner.run(step, form).logits

    found = logits()
    monkeypatch.setattr(emitter, "_NARROWED", frozenset())
    assert kept(program) is DType.F32
    assert found.any() and np.array_equal(found, logits())
