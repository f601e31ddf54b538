"""Products with the activation behind them in one launch: the bits of two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infc.codegen.triton import fusions
from infc.codegen.triton.aot import KernelBuild
from infc.codegen.triton.backend import generate
from infc.ir.builder import ProgramBuilder
from infc.ir.program import Attr, Program, Value, WeightRef
from infc.ir.schemes import SCHEMES
from infc.ir.targets import CUDA, Target, resolve_target
from infc.ir.types import DType, Sym, TensorType
from infc.ir.weights import program_weights

from ...gpu_breadth import RARELY
from ..harness import Chunk, make_step, with_weights
from .emulating import Emulating
from .interpreting import Interpreting
from .running import TARGET, Carrier, Runner
from .test_launches import plan

VOCAB, WIDTH, INNER = 24, 160, 72
TOKENS = 130
"""Two tiles of many rows."""


class Products:
    """Rows of a table, and products by matrices of a scheme, or of a type."""

    def __init__(self, name: str, dtype: str) -> None:
        self.scheme, self.name, self.dtype = SCHEMES.get(name), name, dtype
        self.random = torch.Generator().manual_seed(6)
        self.weights: dict[str, torch.Tensor] = {}
        self.b = ProgramBuilder("acts", phase="planned")
        self.b.symbol("T", 1, 256)

    def weight(self, name: str, value: torch.Tensor) -> WeightRef:
        kinds = {torch.float32: "f32", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int8: "i8"}
        self.weights[name] = value
        kind = TensorType(DType(kinds[value.dtype]), tuple(value.shape))
        return self.b.weight(name, kind)

    def product(self, x: Value, n: int) -> Value:
        """With a bias."""
        k = int(str(x.type.shape[-1]))
        whole = torch.randn(n, k, generator=self.random)
        bias = self.weight(f"b{n}", torch.randn(n, generator=self.random))
        if self.scheme is None:
            w = self.weight(f"w{n}", whole.to(getattr(torch, self.name)))
            return self.b.emit("linear", x, w, bias, dtype=self.dtype)
        codes, scale = self.scheme.quantize(whole)
        operands = (self.weight(f"w{n}", codes), self.weight(f"s{n}", scale), bias)
        how: dict[str, Any] = {"dtype": self.dtype, "scheme": self.name}
        rows = self.scheme.activations
        if rows is None:
            return self.b.emit("decoded_linear", x, *operands, **how)
        options: dict[str, Attr] = {"codes": rows.codes.name, "group": rows.group}
        by = self.b.add("quantize_rows", (x,), options).outputs
        return self.b.emit("scaled_linear", *by, *operands, **how)

    def program(self, act: str) -> Program:
        """`act` is a gated activation, or one of a single operand, between two products."""
        ids = self.b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
        table = torch.randn(VOCAB, WIDTH, generator=self.random)
        if self.scheme is None:
            table = table.to(getattr(torch, self.name))
        x = self.b.emit("embedding", self.weight("table", table), ids)
        gated = act.startswith("gated ")
        x = self.product(x, 2 * INNER if gated else INNER)
        if gated:
            x = self.b.emit("gated_act", x, act=act.removeprefix("gated "))
        elif act == "gelu":
            x = self.b.emit("gelu", x, approximate="tanh")
        else:
            x = self.b.emit(act, x)
        self.b.outputs = [self.product(x, VOCAB)]
        program = self.b.build()
        program = replace(program, spec=replace(program.spec, vocab_size=VOCAB))
        return with_weights(plan(program), self.weights)


def logits(
    program: Program,
    carrier: Carrier,
    place: Path | None = None,
    target: Target = TARGET,
    forms: Sequence[str] = ("decode-16", "mixed-256"),
) -> list[np.ndarray]:
    runner = Runner(program, program_weights(program), carrier, target=target)
    if place is not None:
        assert isinstance(carrier, Emulating)
        carrier.compile(runner.made.codes, place)
    few = make_step([Chunk([i], 0, [1]) for i in (3, 9, 4)], num_groups=0, block_size=16)
    ids = (np.arange(TOKENS) * 5 % VOCAB).tolist()
    many = make_step([Chunk(ids, 0, list(range(9)))], num_groups=0, block_size=16)
    steps = {"decode-16": few, "mixed-256": many}
    return [runner.run(steps[form], form).logits for form in forms]


CODED = ("int8", "int8-token", "int4", "int4-weights", "fp8", "fp8-block", "fp8-weights")
ACTS = ("gated silu", "gated gelu_tanh", "gelu", "relu", "silu")
CASES = [(name, act) for name in (*CODED, "bfloat16", "float32") for act in ACTS]
SOME = [
    *(("int8", "gated silu"), ("int4-weights", "gated silu"), ("fp8-block", "gated gelu_tanh")),
    *(("int8-token", "gelu"), ("bfloat16", "gelu"), ("fp8-weights", "relu")),
]
MARKED = [one if one in SOME else pytest.param(*one, marks=pytest.mark.breadth) for one in CASES]


@pytest.mark.parametrize(("name", "act"), MARKED)
def test_products_with_activations_have_the_bits_of_both(
    name: str, act: str, interpreting: Interpreting, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The interpreter knows no numbers of e4m3: it decodes them.
    target = resolve_target("sm_80") if name.startswith("fp8") else TARGET
    program = Products(name, "f32").program(act)
    fused = generate(program, target).forms
    found = logits(program, interpreting, target=target)
    monkeypatch.setattr(fusions, "_FUSIONS", {})
    single = generate(program, target).forms
    saved = [len(b.launches) - len(a.launches) for a, b in zip(fused, single, strict=True)]
    # Of many rows, only codes are taken with a gated activation.
    coded = name in SCHEMES and SCHEMES[name].activations is not None
    assert saved == [1, 1, 1, 1] if coded or not act.startswith("gated") else [1, 1, 0, 0]
    wanted = logits(program, interpreting, target=target)
    for one, other in zip(found, wanted, strict=True):
        assert np.isfinite(one).all() and one.any()
        assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "act"),
    [("int8", "gated silu"), ("fp8", "gated silu"), ("bfloat16", "gelu"), ("int4-weights", "gelu")],
)
def test_compiled_products_with_activations_have_the_bits_of_both(
    name: str, act: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounded between to a narrower type."""
    program = Products(name, "bf16").program(act)
    found = logits(program, Emulating(), tmp_path / "a")
    monkeypatch.setattr(fusions, "_FUSIONS", {})
    for one, other in zip(found, logits(program, Emulating(), tmp_path / "b"), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.breadth
@pytest.mark.parametrize(
    "target",
    [one if one in ("sm_80", "sm_90") else pytest.param(one, marks=RARELY) for one in CUDA.targets],
)
def test_products_by_codes_fit(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With sizes that tiles divide, as models have them."""
    monkeypatch.setitem(globals(), "WIDTH", 1024)
    monkeypatch.setitem(globals(), "INNER", 1024)
    machine = resolve_target(target)
    codes = {
        key: code
        for name in CODED
        for key, code in generate(
            Products(name, "bf16").program("gated silu"), machine
        ).codes.items()
        if code.function in ("coded_linear", "e4m3_linear")
    }
    assert {dict(code.constants)["GATED"] for code in codes.values()} == {True, False}
    build = KernelBuild(codes, machine, tmp_path / "kernels")
    build.start()
    assert build.wait().keys() == codes.keys()
