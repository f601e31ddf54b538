"""Products by e4m3: on tensor cores that multiply it, and decoded to bfloat16 elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infc.codegen.registry import get_backend
from infc.codegen.triton.aot import KernelBuild
from infc.codegen.triton.backend import generate
from infc.ir.builder import ProgramBuilder
from infc.ir.e4m3 import E4M3_LEVELS, encode_e4m3
from infc.ir.interpret import interpret
from infc.ir.program import Attr, Program, Value, WeightRef
from infc.ir.schemes import SCHEMES, Scheme
from infc.ir.targets import resolve_target
from infc.ir.types import DType, Sym, TensorType
from infc.ir.weights import program_weights

from ..harness import Chunk, make_step, with_weights
from .emulating import Emulating
from .interpreting import Interpreting
from .running import Carrier, Runner

TOKENS, VOCAB, WIDTH, INNER = 19, 40, 150, 140
"""More than a tile of 128 in each direction, and no multiple of it."""
NAMES = [name for name, scheme in SCHEMES.items() if scheme.is_fp8]
OF_KINDS = ("fp8", "fp8-block", "fp8-block-weights")
MARKED = [
    name if name in OF_KINDS else pytest.param(name, marks=pytest.mark.breadth) for name in NAMES
]
SM_80 = resolve_target("sm_80")


class Products:
    """Rows looked up in a table of a scheme, and two products, the second one with a bias."""

    def __init__(self, scheme: Scheme, *, dtype: DType = DType.F32) -> None:
        self.scheme, self.dtype = scheme, dtype
        self.weights: dict[str, torch.Tensor] = {}
        self.random = torch.Generator().manual_seed(4)
        self.b = ProgramBuilder("products", phase="planned")
        self.b.symbol("T", 1, 64)
        ids = self.b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
        how: dict[str, Any] = {"scheme": scheme.name, "dtype": dtype.value}
        x = self.b.emit(
            "scaled_embedding", *self.matrix("table", VOCAB, WIDTH), ids, width=WIDTH, **how
        )
        x = self.product(x, INNER, WIDTH, "w1")
        x = self.product(x, VOCAB, INNER, "w2", bias=True)
        self.b.outputs = [x]

    def matrix(self, name: str, n: int, k: int) -> tuple[WeightRef, WeightRef]:
        codes, scale = self.scheme.quantize(torch.randn(n, k, generator=self.random))
        self.weights |= {name: codes, f"{name}_scale": scale}
        return (
            self.b.weight(name, TensorType(DType.U8, tuple(codes.shape))),
            self.b.weight(f"{name}_scale", TensorType(DType.F32, tuple(scale.shape))),
        )

    def product(self, x: Value, n: int, k: int, name: str, *, bias: bool = False) -> Value:
        how: dict[str, Any] = {"scheme": self.scheme.name, "dtype": self.dtype.value}
        operands: list[Value | WeightRef] = [*self.matrix(name, n, k)]
        if bias:
            self.weights["bias"] = torch.randn(n, generator=self.random)
            operands.append(self.b.weight("bias", TensorType(DType.F32, (n,))))
        rows = self.scheme.activations
        if rows is None:
            return self.b.emit("decoded_linear", x, *operands, **how)
        options: dict[str, Attr] = {"codes": rows.codes.name, "group": rows.group}
        codes = self.b.add("quantize_rows", (x,), options).outputs
        return self.b.emit("scaled_linear", *codes, *operands, **how)

    def program(self) -> Program:
        program = self.b.build()
        program = replace(program, spec=replace(program.spec, vocab_size=VOCAB))
        return with_weights(program, self.weights)


def outcome(program: Program, runner: Runner) -> tuple[np.ndarray, np.ndarray]:
    """What the kernels give and what the ops mean."""
    ids = np.arange(TOKENS) * 2
    wanted = interpret(program, {"input_ids": torch.tensor(ids)}, program_weights(program))[0]
    step = make_step([Chunk(ids.tolist(), 0, [1, 2])], num_groups=0, block_size=16)
    return runner.run(step).logits, wanted.float().numpy()


def emulated(program: Program, place: Path) -> Runner:
    process = Emulating()
    runner = Runner(program, program_weights(program), process)
    process.compile(runner.made.codes, place)
    return runner


def decoded(program: Program, process: Carrier) -> Runner:
    return Runner(program, program_weights(program), process, target=SM_80)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    assert np.isfinite(wanted).all() and wanted.any()
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("name", MARKED)
def test_products_mean_what_the_ops_mean(
    name: str, interpreting: Interpreting, tmp_path: Path
) -> None:
    """A last bit of the first product may round to the neighbouring code in the second."""
    program = Products(SCHEMES[name]).program()
    bound = 1e-5 if SCHEMES[name].activations is None else 2e-2
    assert error(*outcome(program, decoded(program, interpreting))) < bound
    assert error(*outcome(program, emulated(program, tmp_path))) < bound


@pytest.mark.parametrize("on", ["sm_80", "sm_90"])
def test_rows_are_rounded_to_the_same_codes(
    on: str, interpreting: Interpreting, tmp_path: Path
) -> None:
    """Numbers of all sizes, ties among them, and NaN, by a product that only hands them on."""
    b = ProgramBuilder("rounded", phase="planned")
    b.symbol("T", 1, 64)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
    square = TensorType(DType.F32, (VOCAB, VOCAB))
    x = b.emit("embedding", b.weight("table", square), ids)
    # Weights are finite: what is NaN comes of a root.
    x = b.emit("add", x, b.emit("sqrt", b.emit("embedding", b.weight("squares", square), ids)))
    codes = b.add("quantize_rows", (x,), {"codes": "e4m3", "group": 0}).outputs
    w = b.weight("w", TensorType(DType.U8, (VOCAB, VOCAB)))
    scale = b.weight("scale", TensorType(DType.F32, (VOCAB,)))
    b.outputs = [b.emit("scaled_linear", *codes, w, scale, dtype="f32", scheme="fp8")]
    levels = torch.tensor(E4M3_LEVELS[: VOCAB * 3 : 3])
    table = torch.randn(VOCAB, VOCAB) * torch.logspace(-6, 6, VOCAB)[:, None]
    table[2] = levels[:VOCAB]
    table[4] = (torch.tensor(E4M3_LEVELS[:VOCAB]) + torch.tensor(E4M3_LEVELS[1 : VOCAB + 1])) / 2
    table[[2, 4], 0] = 448.0
    table[8] = 0.0
    squares = torch.zeros(VOCAB, VOCAB)
    squares[6, 3] = -1.0
    table[10] = torch.logspace(-4, 2, VOCAB)
    weights = {"table": table, "squares": squares, "scale": torch.ones(VOCAB)}
    weights["w"] = encode_e4m3(torch.eye(VOCAB))
    program = b.build()
    program = replace(program, spec=replace(program.spec, vocab_size=VOCAB))
    program = with_weights(program, weights)
    runner = decoded(program, interpreting) if on == "sm_80" else emulated(program, tmp_path)
    found, wanted = outcome(program, runner)
    assert np.isnan(wanted).any() and (wanted == 0).any()
    assert np.array_equal(found, wanted, equal_nan=True)


@pytest.mark.parametrize(
    ("target", "kind"), [("sm_80", "bf16"), ("sm_89", "e4m3"), ("sm_90", "e4m3")]
)
def test_tensor_cores_multiply_e4m3_where_they_can(target: str, kind: str, tmp_path: Path) -> None:
    machine = resolve_target(target)
    made = generate(Products(SCHEMES["fp8"]).program(), machine)
    codes = {k: one for k, one in made.codes.items() if one.function == "e4m3_linear"}
    build = KernelBuild(codes, machine, tmp_path / "kernels")
    build.start()
    texts = [
        (tmp_path / kernel.source.removeprefix("code/")).read_text()
        for kernel in build.wait().values()
    ]
    # On sm_90, those of 16 rows multiply float16: only wider instructions take e4m3 there.
    assert any(f".{kind}.{kind}" in text for text in texts)
    assert any(".e4m3.e4m3" in text for text in texts) == (kind == "e4m3")


@pytest.mark.parametrize("name", NAMES)
def test_the_backend_holds_each_of_them(name: str) -> None:
    backend = get_backend("triton")
    assert backend.can_hold(SCHEMES[name].weight)
    backend.check(Products(SCHEMES[name]).program(), SM_80)
