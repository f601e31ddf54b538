"""Programs with the shapes of models that people run: what kernels must fit for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from infc.ir.builder import ProgramBuilder
from infc.ir.program import Program, Value, WeightRef
from infc.ir.resources import KvGroup
from infc.ir.types import DType, Sym, TensorType

T, R = Sym("T"), Sym("R")


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer, and a head. `share` query heads have one KV head."""

    hidden: int
    heads: int
    share: int
    head: int
    inner: int
    vocab: int
    context: int
    cache: str = "bf16"
    softcap: float | None = None


SHAPES = {
    "8b": Shape(4096, 32, 4, 128, 14336, 128256, 32768),
    "gemma2-2b": Shape(2304, 8, 2, 256, 9216, 256000, 8192, softcap=50.0),
    "1b-int8-cache": Shape(2048, 32, 4, 64, 8192, 128256, 131072, "i8"),
    "gemma2-2b-int8-cache": Shape(2304, 8, 2, 256, 9216, 256000, 8192, "i8"),
    "1b-e4m3-cache": Shape(2048, 32, 4, 64, 8192, 128256, 131072, "e4m3"),
    "gemma2-2b-e4m3-cache": Shape(2304, 8, 2, 256, 9216, 256000, 8192, "e4m3"),
    "7b-float32-cache": Shape(4096, 32, 1, 128, 11008, 32000, 4096, "f32"),
}


def layer(shape: Shape) -> Program:
    """A lowered program in bfloat16 with float32 between its products."""
    b = ProgramBuilder("layer", phase="lowered")
    b.symbol("T", 1, 8192)
    b.symbol("R", 1, 256)
    groups, size = shape.heads // shape.share, shape.head
    b.resources = (KvGroup("full", (0,), groups, size, size, shape.cache, 32),)
    ids, positions, index = (
        b.input(name, TensorType(DType.I64, (dim,)))
        for name, dim in (("input_ids", T), ("positions", T), ("logits_index", R))
    )

    def weight(name: str, *sizes: int, dtype: DType = DType.BF16) -> WeightRef:
        return b.weight(name, TensorType(dtype, sizes))

    def norm(name: str) -> WeightRef:
        return weight(name, shape.hidden, dtype=DType.F32)

    x = b.emit("embedding", weight("embed", shape.vocab, shape.hidden), ids)
    x = b.emit("cast", x, dtype="f32")
    frequencies = weight("frequencies", size // 2, dtype=DType.F32)
    turns = [b.emit("rotary", positions, frequencies, function=one) for one in ("cos", "sin")]
    widths = (shape.heads * size, groups * size, groups * size)
    normed = b.emit("rms_norm", x, norm("n1"), eps=1e-5, dtype="bf16")
    merged = b.emit("linear", normed, weight("qkv", sum(widths), shape.hidden), dtype="f32")
    parts: list[Value] = []
    for place, width in enumerate(widths):
        start = sum(widths[:place])
        part = b.emit("slice", merged, dim=1, start=start, stop=start + width)
        parts.append(b.emit("reshape", part, shape=("T", width // size, size)))
    where: dict[str, Any] = {"layer": 0, "group": "full"}
    q = b.emit("rope_kv_write", *parts, *turns, rotary_dim=size, **where)
    limits: dict[str, Any] = {"scale": 0.1, "softcap": shape.softcap}
    y = b.emit("paged_attention", q, value_head_dim=size, **limits, **where)
    y = b.emit("reshape", y, shape=("T", shape.heads * size))
    y = b.emit("linear", y, weight("o", shape.hidden, shape.heads * size))
    rest = {"eps": 1e-5, "dtype": "bf16"}
    normed, x = b.add("add_rms_norm", (y, x, norm("n2")), rest).outputs
    y = b.emit("linear", normed, weight("up", 2 * shape.inner, shape.hidden), dtype="bf16")
    y = b.emit("gated_act", y, act="silu")
    y = b.emit("linear", y, weight("down", shape.hidden, shape.inner), dtype="f32")
    y, x = (b.emit("take", one, index) for one in (y, x))
    hidden, _ = b.add("add_rms_norm", (y, x, norm("n3")), {"eps": 1e-5}).outputs
    b.output(logits=b.emit("linear", hidden, WeightRef("embed")), hidden=hidden)
    program = b.build()
    spec = replace(program.spec, vocab_size=shape.vocab, max_context=shape.context)
    return replace(program, spec=spec)
