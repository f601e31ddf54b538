"""Which weights are counted under which class, and how many bits each of them takes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infc.driver.held_formats import held_formats
from infc.ir.builder import ProgramBuilder
from infc.ir.program import ModelSpec, Program
from infc.ir.schemes import SCHEMES
from infc.ir.types import DType, Sym, TensorType
from infc.passes.base import PassContext
from infc.passes.quantize_weights import QuantizeWeights

VOCAB, EXPERTS = 10, 3


def model(width: int, inner: int, positions: int) -> Program:
    """Tables of tokens and of positions, experts, and a head of its own."""
    b = ProgramBuilder("model", ModelSpec("model", 1, width, 1, 1, width, VOCAB, 64))
    b.symbol("T", 1, 64)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
    index = b.input("index", TensorType(DType.I64, (Sym("T"), 2)))
    best = b.input("best", TensorType(DType.F32, (Sym("T"), 2)))
    shapes = {
        "tokens": (VOCAB, width),
        "positions": (positions, width),
        "gate_up": (EXPERTS, 2 * inner, width),
        "down": (EXPERTS, width, inner),
        "head": (VOCAB, width),
    }
    w = {name: b.weight(name, TensorType(DType.F32, shape)) for name, shape in shapes.items()}
    places = b.input("positions", TensorType(DType.I64, (Sym("T"),)))
    x = b.emit("embedding", w["tokens"], ids)
    x = b.emit("add", x, b.emit("embedding", w["positions"], places))
    experts = (x, index, best, w["gate_up"], w["down"])
    x = b.add("moe", experts, {"act": "silu"}, layer=0).output
    b.output(b.emit("linear", x, w["head"]))
    return b.build()


@settings(max_examples=40)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from(list(SCHEMES)))
def test_weights_are_counted_without_what_pads_a_block(width: int, inner: int, scheme: str) -> None:
    program = QuantizeWeights(scheme=scheme, embedding=scheme).run(
        model(width, inner, 100), PassContext()
    )
    found = held_formats(program.program)
    formats = {one.place: one for one in found.formats.values()}
    numbers = {
        "embeddings": VOCAB * width,
        "layers": EXPERTS * 3 * inner * width,
        "head": VOCAB * width,
        "other": 100 * width,
    }
    assert {place: one.num_weights for place, one in formats.items()} == numbers
    form = SCHEMES[scheme].weight
    kind = TensorType(DType.F32, (VOCAB, width))
    num_bytes = form.code_type(kind).num_bytes() + form.scale_type(kind).num_bytes()
    bits = 8 * num_bytes / (VOCAB * width)
    for place in ("embeddings", "head"):
        assert formats[place].bits_per_weight == pytest.approx(bits)
    assert (formats["embeddings"].held, formats["other"].held) == (scheme, "f32")
