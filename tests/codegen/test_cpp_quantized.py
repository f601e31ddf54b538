"""Programs of 8-bit codes: generated C++ has the bits of the ops' meanings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from infc.codegen.registry import get_backend
from infc.ir.builder import ProgramBuilder
from infc.ir.errors import ProgramError
from infc.ir.interpret import interpret
from infc.ir.paged_state import PagedState
from infc.ir.program import Program, Value, WeightRef
from infc.ir.resources import KvGroup
from infc.ir.targets import resolve_target
from infc.ir.types import DType, Sym, TensorType
from infc.ir.weights import program_weights
from infc.runtime.executors.base import run_step

from .harness import Chunk, build, make_step, open_cpp, random_weights, with_weights

WIDTH, WIDE, VOCAB = 37, 70, 50


class Products:
    """A program that quantises rows and multiplies them, once more on a slice of the result."""

    def __init__(self, dtype: DType) -> None:
        self.dtype = dtype
        self.b = ProgramBuilder("products", phase="planned")
        self.b.symbol("T", 1, 64)
        ids = self.b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
        self.table = self.b.weight("table", TensorType(dtype, (VOCAB, WIDTH)))
        x = self.product(self.b.emit("embedding", self.table, ids), "w1", WIDE, WIDTH, bias=True)
        x = self.b.emit("slice", x, dim=1, start=3, stop=WIDE - 1)
        self.b.outputs = [self.product(x, "w2", VOCAB, WIDE - 4, bias=False)]

    def product(self, x: Value, name: str, n: int, k: int, *, bias: bool) -> Value:
        codes, scale = self.b.add("quantize_rows", (x,), {}).outputs
        operands: list[Value | WeightRef] = [
            *(codes, scale),
            self.b.weight(name, TensorType(DType.I8, (n, k))),
            self.b.weight(f"{name}_scale", TensorType(DType.F32, (n,))),
        ]
        if bias:
            operands.append(self.b.weight(f"{name}_bias", TensorType(self.dtype, (n,))))
        return self.b.emit("scaled_linear", *operands, dtype=self.dtype.value, scheme="int8-token")

    def program(self) -> Program:
        program = self.b.build()
        program = replace(program, spec=replace(program.spec, vocab_size=VOCAB))
        return with_weights(program, random_weights(program, seed=3))


@pytest.mark.parametrize("target", ["native", "x86-64-v3", "x86-64-v2"])
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16], ids=lambda d: d.value)
def test_products_of_codes_have_the_bits_of_their_meaning(
    dtype: DType, target: str, tmp_path: Path
) -> None:
    program = Products(dtype).program()
    ids = np.random.default_rng(5).integers(0, VOCAB, 23)
    (expected,) = interpret(program, {"input_ids": torch.tensor(ids)}, program_weights(program))
    assert expected.float().abs().max() > 1
    artifact = build(program, tmp_path / "a", resolve_target(target))
    step = make_step([Chunk(list(ids), 0, [1, 2])], num_groups=0, block_size=16)
    for threads in (1, 2):
        actual = run_step(open_cpp(artifact, num_threads=threads), step).logits
        assert np.array_equal(actual, expected.float().numpy())
    alone = make_step([Chunk([int(ids[9])], 9, [1, 2])], num_groups=0, block_size=16)
    assert np.array_equal(run_step(open_cpp(artifact), alone).logits[0], actual[9])


def test_a_matrix_that_is_computed_is_refused() -> None:
    b = ProgramBuilder("p", phase="planned")
    b.symbol("T", 1, 64)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
    x = b.emit("embedding", b.weight("table", TensorType(DType.F32, (VOCAB, 8))), ids)
    codes, scale = b.add("quantize_rows", (x,), {}).outputs
    square = b.weight("square", TensorType(DType.F32, (8, 8)))
    matrix, matrix_scale = b.add("quantize_rows", (b.emit("neg", square),), {}).outputs
    operands = (codes, scale, matrix, matrix_scale)
    b.outputs = [b.emit("scaled_linear", *operands, dtype="f32", scheme="int8-token")]
    with pytest.raises(ProgramError, match="must be a weight"):
        get_backend("cpp").check(b.build(), resolve_target("native"))


@pytest.mark.parametrize("op", ["quantize_rows", "decoded_linear", "scaled_embedding"])
def test_codes_without_kernels_are_refused_with_what_to_do(op: str) -> None:
    b = ProgramBuilder("p", phase="planned")
    b.symbol("T", 1, 64)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
    codes = b.weight("w.codes", TensorType(DType.U8, (VOCAB, 8)))
    scales = b.weight("w.scales", TensorType(DType.F32, (VOCAB,)))
    how = {"dtype": "f32", "scheme": "fp8-weights"}
    if op == "scaled_embedding":
        b.outputs = [b.emit(op, codes, scales, ids, width=8, **how)]
    else:
        x = b.emit("embedding", b.weight("table", TensorType(DType.F32, (VOCAB, 8))), ids)
        if op == "decoded_linear":
            b.outputs = [b.emit(op, x, codes, scales, **how)]
        else:
            b.outputs = [b.add(op, (x,), {"codes": "e4m3"}).outputs[1]]
    program = b.build()
    (node,) = [node for node in program.nodes if node.op == op]
    verdict = get_backend("cpp").supports(node, program, resolve_target("native"))
    assert not verdict.accepted
    assert "e4m3" in verdict.reason and "int8 or int4" in verdict.reason
    assert get_backend("reference").supports(node, program, resolve_target("native")).accepted


HEADS, GROUPS, SIZE, VALUE_SIZE, BLOCK = 4, 2, 12, 6, 16


def cached(dtype: DType) -> Program:
    """Two layers over one cache of codes: with the rope in the write, and with none."""
    b = ProgramBuilder("cached", phase="planned")
    b.symbol("T", 1, 64)
    ids, positions = (
        b.input(name, TensorType(DType.I64, (Sym("T"),))) for name in ("input_ids", "positions")
    )
    b.resources = (KvGroup("kv", (0, 1), GROUPS, SIZE, VALUE_SIZE, "i8", BLOCK),)
    q, k, v = (
        b.emit(
            "reshape",
            b.emit("embedding", b.weight(name, TensorType(dtype, (VOCAB, heads * size))), ids),
            shape=("T", heads, size),
        )
        for name, heads, size in (
            ("q", HEADS, SIZE),
            ("k", GROUPS, SIZE),
            ("v", GROUPS, VALUE_SIZE),
        )
    )
    angles = (
        b.emit("embedding", b.weight(name, TensorType(dtype, (64, SIZE // 2))), positions)
        for name in ("cos", "sin")
    )
    place: dict[str, Any] = {"layer": 0, "group": "kv"}
    turned = b.emit("rope_kv_write", q, k, v, *angles, rotary_dim=SIZE, **place)
    b.add("kv_write", (b.emit("neg", k), v), {"layer": 1, "group": "kv"})
    options: dict[str, Any] = {"value_head_dim": VALUE_SIZE, "scale": 0.2}
    first = b.emit("paged_attention", turned, **place, **options)
    second = b.emit("paged_attention", b.emit("mul", q, 0.5), layer=1, group="kv", **options)
    both = b.emit("add", first, b.emit("mul", second, 3.0))
    b.outputs = [b.emit("reshape", both, shape=("T", HEADS * VALUE_SIZE))]
    program = b.build()
    program = replace(program, spec=replace(program.spec, vocab_size=HEADS * VALUE_SIZE))
    return with_weights(program, random_weights(program, seed=4))


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16], ids=lambda d: d.value)
def test_attention_over_codes_means_what_the_ops_mean(dtype: DType, tmp_path: Path) -> None:
    program = cached(dtype)
    ids = np.random.default_rng(6).integers(0, VOCAB, 45)
    state = PagedState.allocate(program.resources, 8)
    executor = open_cpp(build(program, tmp_path / "a"))
    for first, last in ((0, 20), (20, 44), (44, 45)):
        positions = torch.arange(first, last)
        state.set_step(
            *(positions, torch.tensor([0, last - first]), torch.tensor([last])),
            {"kv": torch.tensor([[5, 2, 7]])},
        )
        inputs = {"input_ids": torch.tensor(ids[first:last]), "positions": positions}
        (expected,) = interpret(program, inputs, program_weights(program), state)
        chunk = Chunk(list(ids[first:last]), first, [5, 2, 7])
        actual = run_step(executor, make_step([chunk], num_groups=1, block_size=BLOCK)).logits
        bound = 1e-5 if dtype is DType.F32 else 2e-2
        error = (torch.from_numpy(actual) - expected.float()).abs().max()
        assert error < bound * expected.float().abs().max(), (first, float(error))


def routed(dtype: DType, *, biased: bool) -> Program:
    """Five experts of codes, two for each token, through a gate with a limit."""
    b = ProgramBuilder("routed", phase="planned")
    b.symbol("T", 1, 64)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
    x = b.emit("embedding", b.weight("table", TensorType(dtype, (VOCAB, WIDTH))), ids)
    router = b.emit("linear", x, b.weight("router", TensorType(dtype, (5, WIDTH))))
    weight, index = b.add("topk", (router,), {"k": 2}).outputs
    operands: list[Value | WeightRef] = [x, index, weight]
    for name, rows, columns in (("gate_up", 22, WIDTH), ("down", WIDTH, 11)):
        operands.append(b.weight(name, TensorType(DType.I8, (5, rows, columns))))
        operands.append(b.weight(f"{name}_scale", TensorType(DType.F32, (5, rows))))
    if biased:
        operands.append(b.weight("up_bias", TensorType(dtype, (5, 22))))
        operands.append(b.weight("down_bias", TensorType(dtype, (5, WIDTH))))
    gate: dict[str, Any] = {"act": "silu", "alpha": 1.7, "limit": 900.0, "shift": 1.0}
    b.outputs = [b.emit("scaled_moe", *operands, scheme="int8-token", **gate)]
    program = b.build()
    program = replace(program, spec=replace(program.spec, vocab_size=WIDTH))
    return with_weights(program, random_weights(program, seed=5))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16], ids=lambda d: d.value)
def test_experts_of_codes_mean_what_the_ops_mean(
    dtype: DType, biased: bool, tmp_path: Path
) -> None:
    program = routed(dtype, biased=biased)
    ids = np.random.default_rng(7).integers(0, VOCAB, 23)
    (expected,) = interpret(program, {"input_ids": torch.tensor(ids)}, program_weights(program))
    executor = open_cpp(build(program, tmp_path / "a"))
    chunk = Chunk(list(ids), 0, [1, 2])
    actual = run_step(executor, make_step([chunk], num_groups=0, block_size=BLOCK)).logits
    bound = 1e-5 if dtype is DType.F32 else 2e-2
    error = (torch.from_numpy(actual) - expected.float()).abs().max()
    assert error < bound * expected.float().abs().max()
