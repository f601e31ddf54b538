"""Which products are next to attention, in the layouts that models have."""

from __future__ import annotations

import pytest

from infc.ir.builder import ProgramBuilder
from infc.ir.program import ModelSpec, Program, Value, WeightRef
from infc.ir.types import DType, Sym, TensorType
from infc.passes.nearest_products import (
    attention_products,
    feed_forward_products,
    query_products,
)


def layer(*, fused: bool, gated: bool, latent: bool) -> Program:
    """Attention and a feed-forward part, with residuals.

    `fused`: queries, keys and values are parts of one product; `gated`: the result is multiplied by
    a gate of the same rows; `latent`: values come out of a smaller row, by two products.
    """
    b = ProgramBuilder("layer", ModelSpec("layer", 1, 32, 4, 4, 8, 96, 64))
    b.symbol("T", 1, 64)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))

    def weight(name: str, *shape: int) -> WeightRef:
        return b.weight(name, TensorType(DType.F32, shape))

    x = b.emit("embedding", weight("embed", 96, 32), ids)
    b.layer = 0
    rows = b.emit("rms_norm", x, weight("norm1", 32), eps=1e-5)
    parts: list[Value] = []
    if fused:
        whole = b.emit("linear", rows, weight("qkv", 96, 32))
        parts = [
            b.emit("slice", whole, dim=1, start=32 * i, stop=32 * i + 32, step=1) for i in range(3)
        ]
    else:
        small = b.emit("linear", rows, weight("down_v", 8, 32)) if latent else rows
        parts = [b.emit("linear", rows, weight(name, 32, 32)) for name in ("q", "k")]
        parts.append(b.emit("linear", small, weight("v", 32, 8 if latent else 32)))
    heads = [b.emit("reshape", part, shape=("T", 4, 8)) for part in parts]
    seen = b.emit("reshape", b.emit("attention", *heads, layer=0, scale=0.5), shape=("T", 32))
    if gated:
        gate = b.emit("sigmoid", b.emit("linear", rows, weight("gate", 32, 32)))
        seen = b.emit("mul", seen, gate)
    x = b.emit("add", x, b.emit("linear", seen, weight("o", 32, 32)))
    inner = b.emit("rms_norm", x, weight("norm2", 32), eps=1e-5)
    up = b.emit("silu", b.emit("linear", inner, weight("up", 48, 32)))
    x = b.emit("add", x, b.emit("linear", up, weight("down", 32, 48)))
    b.layer = None
    b.output(b.emit("linear", x, weight("head", 96, 32)))
    return b.build()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("fused", "latent", "before"),
    [(False, False, "q k v"), (True, False, "qkv"), (False, True, "q k v")],
)
def test_those_before_and_behind_attention_are_found(
    fused: bool, latent: bool, gated: bool, before: str
) -> None:
    program = layer(fused=fused, gated=gated, latent=latent)
    assert names_of(program, attention_products(program)) == {*before.split(), "o"}
    queries = set() if fused else {"q"}
    assert names_of(program, query_products(program)) == queries
    assert names_of(program, feed_forward_products(program)) == {"down"}


def names_of(program: Program, found: set[int]) -> set[str]:
    """The matrices of these products."""
    return {str(node.inputs[1])[1:] for node in program.nodes if id(node) in found}


def test_nothing_is_behind_an_activation_function_of_another_part() -> None:
    """Nor of a router, nor before a residual sum; a sum within the function is not one."""
    b = ProgramBuilder("model")
    b.symbol("T", 1, 64)
    x = b.input("x", TensorType(DType.F32, (Sym("T"), 8)))

    def weight(name: str, *shape: int) -> WeightRef:
        return b.weight(name, TensorType(DType.F32, shape))

    scores = b.emit("sigmoid", b.emit("linear", x, weight("router", 4, 8)))
    best, index = b.add("topk", (scores,), {"k": 2}).outputs
    experts = weight("gate_up", 4, 12, 8), weight("downs", 4, 8, 6)
    x = b.emit("add", x, b.emit("moe", x, index, best, *experts, act="silu"))
    inner = b.emit("linear", x, weight("up", 12, 8))
    gelu = b.emit("mul", inner, b.emit("add", b.emit("tanh", inner), 1.0))
    x = b.emit("add", b.emit("relu", x), b.emit("linear", gelu, weight("down", 8, 12)))
    b.output(b.emit("linear", x, weight("head", 16, 8)))
    assert names_of(b.build(), feed_forward_products(b.build())) == {"down"}
