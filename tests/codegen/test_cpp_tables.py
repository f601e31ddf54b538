"""Tables of codes: rows have the bits of their meaning, and a tied table lies in a file once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from infc.codegen.cpp.buffers import has_kernels
from infc.codegen.registry import get_backend
from infc.ir.builder import ProgramBuilder
from infc.ir.errors import ProgramError
from infc.ir.interpret import interpret
from infc.ir.program import Program, WeightExpr, WeightRef
from infc.ir.schemes import SCHEMES
from infc.ir.targets import resolve_target
from infc.ir.types import DType, Sym, TensorType
from infc.ir.weights import program_weights
from infc.runtime.executors.base import run_step

from .harness import Chunk, build, make_step, open_cpp, with_weights

VOCAB, WIDTH = 131, 77
PLAIN = TensorType(DType.F32, (VOCAB, WIDTH))


def entry(b: ProgramBuilder, part: str, scheme: str) -> WeightRef:
    form = SCHEMES[scheme].weight
    kind = form.code_type(PLAIN) if part == "codes" else form.scale_type(PLAIN)
    source = WeightExpr("checkpoint", (), {"name": "table"})
    return b.weight(f"table.{part}", kind, WeightExpr(part, (source,), {"scheme": scheme}))


def table(scheme: str, dtype: DType = DType.F32, *, tied: bool = False) -> Program:
    """Rows of a table of codes; as they are, or multiplied by the same codes again."""
    b = ProgramBuilder("table", phase="planned")
    b.symbol("T", 1, 64)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
    parts = [entry(b, part, scheme) for part in ("codes", "scales")]
    how = {"dtype": dtype.value, "scheme": scheme}
    x = b.emit("scaled_embedding", *parts, ids, width=WIDTH, **how)
    if tied:
        activations = SCHEMES[scheme].activations
        if activations is None:
            x = b.emit("decoded_linear", x, *parts, **how)
        else:
            rows = b.add("quantize_rows", (x,), {"group": activations.group}).outputs
            x = b.emit("scaled_linear", *rows, *parts, **how)
    b.outputs = [x]
    program = b.build()
    program = replace(program, spec=replace(program.spec, vocab_size=VOCAB))
    matrix = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(9))
    return with_weights(program, {"table": matrix})


IDS = np.random.default_rng(5).integers(0, VOCAB, 23)
IDS[:2] = 0, VOCAB - 1


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16], ids=lambda d: d.value)
@pytest.mark.parametrize("scheme", [n for n, one in SCHEMES.items() if has_kernels(one.weight)])
def test_rows_have_the_bits_of_their_meaning(scheme: str, dtype: DType, tmp_path: Path) -> None:
    program = table(scheme, dtype)
    (expected,) = interpret(program, {"input_ids": torch.tensor(IDS)}, program_weights(program))
    artifact = build(program, tmp_path / "a")
    step = make_step([Chunk(list(IDS), 0, [1, 2])], num_groups=0, block_size=16)
    for threads in (1, 2):
        actual = run_step(open_cpp(artifact, num_threads=threads), step).logits
        assert np.array_equal(actual, expected.float().numpy())
    alone = make_step([Chunk([int(IDS[9])], 9, [1, 2])], num_groups=0, block_size=16)
    assert np.array_equal(run_step(open_cpp(artifact), alone).logits[0], actual[9])


@pytest.mark.parametrize("target", ["native", "x86-64-v3", "x86-64-v2"])
@pytest.mark.parametrize("scheme", ["int8", "int4", "q4_1", "int8-token", "int4-weights"])
def test_a_tied_table_is_stored_once(scheme: str, target: str, tmp_path: Path) -> None:
    tied, alone = table(scheme, tied=True), table(scheme)
    artifact = build(tied, tmp_path / "tied", resolve_target(target))
    names = artifact.manifest.main.weights.tensors
    assert sorted(names) == ["table.codes:packed", "table.scales"]
    single = build(alone, tmp_path / "alone", resolve_target(target))
    sizes = [(one.path / "weights.safetensors").stat().st_size for one in (artifact, single)]
    assert sizes[0] == sizes[1]
    assert sizes[0] < 1.4 * PLAIN.num_bytes() * SCHEMES[scheme].weight.bits / 32 + 30_000
    (expected,) = interpret(tied, {"input_ids": torch.tensor(IDS)}, program_weights(tied))
    step = make_step([Chunk(list(IDS), 0, [1, 2])], num_groups=0, block_size=16)
    actual = run_step(open_cpp(artifact), step).logits
    # Sums of groups are of the numbers that codes stand for, so the last bits may differ.
    error = np.abs(actual - expected.numpy()).max() / expected.abs().max()
    assert error < 1e-6


def test_a_table_that_is_computed_is_refused() -> None:
    b = ProgramBuilder("p", phase="planned")
    b.symbol("T", 1, 64)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
    square = b.weight("square", TensorType(DType.F32, (8, 8)))
    made = b.add("quantize_rows", (b.emit("neg", square),), {}).outputs
    operands = (*made, ids)
    x = b.emit("scaled_embedding", *operands, dtype="f32", scheme="int8-token", width=8)
    b.outputs = [x]
    with pytest.raises(ProgramError, match="must be a weight"):
        get_backend("cpp").check(b.build(), resolve_target("native"))
