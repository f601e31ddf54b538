"""Products with scales of 128 rows and columns: which may be merged, and that no bit changes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infc.ir.builder import ProgramBuilder
from infc.ir.interpret import interpret
from infc.ir.program import Program
from infc.ir.schemes import SCHEMES
from infc.ir.types import DType, Sym, TensorType
from infc.ir.weights import evaluate_weight, program_weights
from infc.passes.base import PassContext
from infc.passes.merge_linears import MergeGateUp
from infc.passes.near_miss import NearMiss
from infc.passes.quantize_weights import QuantizeWeights
from infc.passes.samples import with_random_weights

NAMES = [name for name, scheme in SCHEMES.items() if scheme.is_fp8]
DEPTH = 150


def gated(rows: int, scheme: str) -> Program:
    """A gate of so many rows and what it is multiplied with, in codes."""
    b = ProgramBuilder("gated")
    b.symbol("T", 1, 8)
    x = b.input("x", TensorType(DType.F32, (Sym("T"), DEPTH)))
    kind = TensorType(DType.F32, (rows, DEPTH))
    gate, up = (b.emit("linear", x, b.weight(f"m.{n}.weight", kind)) for n in ("gate", "up"))
    b.output(b.emit("mul", b.emit("silu", gate), up))
    program = with_random_weights(b.build())
    return QuantizeWeights(scheme=scheme).run(program, PassContext()).program


def results(program: Program) -> torch.Tensor:
    x = torch.randn(5, DEPTH, generator=torch.Generator().manual_seed(1))
    (found,) = interpret(program, {"x": x}, program_weights(program))
    return found


@settings(max_examples=20)
@given(st.sampled_from(NAMES), st.sampled_from([1, 64, 128, 130, 256]))
def test_matrices_merge_where_no_scale_is_that_of_two(scheme: str, rows: int) -> None:
    before = gated(rows, scheme)
    result = MergeGateUp().run(before, PassContext())
    if SCHEMES[scheme].weight.tile and rows % 128:
        assert result.program is before
        (miss,) = result.near_misses
        assert isinstance(miss, NearMiss)
        assert miss.reason == f"a matrix has {rows} rows, no multiple of the 128 that share scales"
        return
    assert result.matches == 1
    for part in ("codes", "scales"):
        whole = evaluate_weight(result.program, f"m.gate_up.weight.{part}")
        parts = [evaluate_weight(before, f"m.{name}.weight.{part}") for name in ("gate", "up")]
        assert torch.equal(whole, torch.cat(parts))
    torch.testing.assert_close(results(result.program), results(before), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", ["fp8", "fp8-block"])
def test_rows_are_quantized_once_for_all_that_read_them(scheme: str) -> None:
    nodes = [node.op for node in gated(128, scheme).nodes]
    assert nodes.count("quantize_rows") == 1 and nodes.count("scaled_linear") == 2


def test_rows_in_two_kinds_of_codes_are_two() -> None:
    b = ProgramBuilder("two")
    b.symbol("T", 1, 8)
    x = b.input("x", TensorType(DType.F32, (Sym("T"), DEPTH)))
    kind = TensorType(DType.F32, (4, DEPTH))
    b.output(b.emit("add", *(b.emit("linear", x, b.weight(name, kind)) for name in ("a", "b"))))
    options = QuantizeWeights(scheme="fp8", rules="b=int8-token")
    program = options.run(b.build(), PassContext()).program
    codes = [node.attrs["codes"] for node in program.nodes if node.op == "quantize_rows"]
    assert codes == ["e4m3", "i8"]
