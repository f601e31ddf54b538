"""Programs of a few ops, of every op that needs no KV cache: each starts from a row a token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from infc.ir.builder import ProgramBuilder
from infc.ir.program import Operand, Program, Value, WeightRef
from infc.ir.types import DType, Sym, TensorType

from .harness import random_weights, with_weights

T = Sym("T")
WIDTH = 37
VOCAB = 50


class Case:
    """A builder with a `[T, WIDTH]` value to start from."""

    def __init__(self, dtype: DType, held: DType | None = None) -> None:
        self.dtype = dtype
        self.held = held or dtype
        self.b = ProgramBuilder("case", phase="planned")
        self.b.symbol("T", 1, 64)
        self.ids = self.b.input("input_ids", TensorType(DType.I64, (T,)))
        self.positions = self.b.input("positions", TensorType(DType.I64, (T,)))
        table = self.weight("table", VOCAB, WIDTH)
        self.x = self.op("embedding", table, self.ids)

    def weight(self, name: str, *shape: int) -> WeightRef:
        return self.b.weight(name, TensorType(self.dtype, shape))

    def matrix(self, name: str, *shape: int) -> WeightRef:
        """A weight that rows are multiplied by."""
        return self.b.weight(name, TensorType(self.held, shape))

    def op(self, name: str, *operands: Operand, **attrs: object) -> Value:
        return self.b.add(name, operands, attrs).outputs[0]

    def two(self, name: str, *operands: Operand, **attrs: object) -> tuple[Value, Value]:
        first, second = self.b.add(name, operands, attrs).outputs
        return first, second


def pointwise(c: Case) -> Value:
    y = c.op("mul", c.x, c.op("sigmoid", c.x))
    y = c.op("add", y, 0.25)
    y = c.op("where", c.op("gt", y, 0.0), c.op("tanh", y), c.op("exp", y))
    y = c.op("sub", c.op("gelu", y, approximate="tanh"), c.op("silu", c.op("neg", y)))
    return c.op("clamp", c.op("div", y, c.op("add", c.op("abs", c.x), 1.0)), min=-2.0, max=1.5)


def elementary(c: Case) -> Value:
    y = c.op("sqrt", c.op("abs", c.x))
    turned = c.op("sub", c.op("sin", c.x), c.op("cos", y))
    return c.op("add", turned, c.op("pow", y, c.op("floor", c.op("mul", c.x, 2.0))))


def row_norm(c: Case) -> Value:
    wide = c.op("cast", c.x, dtype="f32")
    mean = c.op("mean", c.op("mul", wide, wide), dims=(-1,), keepdim=True)
    y = c.op("mul", wide, c.op("rsqrt", c.op("add", mean, 1e-6)))
    return c.op("mul", c.op("cast", y, dtype=c.dtype.value), c.weight("scale", WIDTH))


def reductions(c: Case) -> Value:
    cube = c.op("reshape", c.op("slice", c.x, dim=1, start=1, stop=WIDTH), shape=("T", 4, 9))
    low = c.op("sum", cube, dims=(1,), keepdim=False)
    high = c.op("amax", cube, dims=(2,), keepdim=True)
    spread = c.op(
        "add", c.op("transpose", cube, perm=(0, 2, 1)), c.op("reshape", low, shape=("T", 9, 1))
    )
    y = c.op("mul", c.op("transpose", spread, perm=(0, 2, 1)), high)
    return c.op("reshape", y, shape=("T", 36))


def views(c: Case) -> Value:
    left = c.op("slice", c.x, dim=1, start=0, stop=20, step=2)
    right = c.op("slice", c.x, dim=1, start=5, stop=15)
    both = c.op("concat", left, right, dim=1)
    heads = c.op("transpose", c.op("reshape", both, shape=("T", 4, 5)), perm=(1, 0, 2))
    back = c.op("reshape", c.op("transpose", heads, perm=(1, 0, 2)), shape=("T", 20))
    return c.op("add", back, both)


def parts_of_heads(c: Case) -> Value:
    """Heads first, and each head on its own: the place of a head must not depend on T."""
    x = c.op("slice", c.x, dim=1, start=0, stop=36)
    heads = c.op("transpose", c.op("reshape", x, shape=("T", 4, 9)), perm=(1, 0, 2))
    first = c.op("neg", c.op("slice", heads, dim=0, start=0, stop=1))
    rest = c.op("mul", c.op("slice", heads, dim=0, start=1, stop=4), 2.0)
    both = c.op("concat", first, rest, dim=0)
    back = c.op("transpose", c.op("add", both, heads), perm=(1, 0, 2))
    return c.op("reshape", back, shape=("T", 36))


def linear_bias(c: Case) -> Value:
    y = c.op("linear", c.x, c.matrix("w", 45, WIDTH), c.weight("b", 45))
    return c.op("linear", c.op("slice", y, dim=1, start=3, stop=44), c.matrix("w2", 70, 41))


def norms(c: Case) -> Value:
    normed, total = c.two("add_rms_norm", c.x, c.op("neg", c.x), c.weight("n1", WIDTH), eps=1e-5)
    other, total2 = c.two(
        "add_layer_norm", c.x, total, c.weight("n2", WIDTH), c.weight("b2", WIDTH), eps=1e-5
    )
    y = c.op("add", c.op("layer_norm", total2, c.weight("n3", WIDTH), eps=1e-6), other)
    y = c.op("add", y, normed)
    return c.op("rms_norm", y, c.weight("n4", WIDTH), eps=1e-6, round_before_scale=False)


def gates(c: Case) -> Value:
    return c.op("gated_act", c.op("linear", c.x, c.matrix("gu", 66, WIDTH)), act="silu")


def routing(c: Case) -> Value:
    scores = c.op("softmax", c.op("linear", c.x, c.matrix("router", 8, WIDTH)), dim=-1)
    weight, index = c.two("topk", scores, k=2)
    weight = c.op("div", weight, c.op("sum", weight, dims=(-1,), keepdim=True))
    return c.op(
        "moe",
        c.x,
        index,
        weight,
        c.matrix("gate_up", 8, 22, WIDTH),
        c.matrix("down", 8, WIDTH, 11),
        act="silu",
    )


def grouped_routing(c: Case) -> Value:
    """The two best of four groups, by the sum of their two best; two experts of those."""
    scores = c.op("sigmoid", c.op("linear", c.x, c.matrix("router", 8, WIDTH)))
    groups = c.op("reshape", scores, shape=("T", 4, 2))
    _, best = c.two("topk", c.op("sum", groups, dims=(2,), keepdim=False), k=2)
    zeros = c.op("full", shape=("T", 4), value=0.0, dtype=c.dtype.value)
    mask = c.op("reshape", c.op("scatter", zeros, best, dim=1, value=1.0), shape=("T", 4, 1))
    mask = c.op("reshape", c.op("expand", mask, shape=("T", 4, 2)), shape=("T", 8))
    _, index = c.two("topk", c.op("where", c.op("gt", mask, 0.0), scores, float("-inf")), k=2)
    experts = (c.matrix("gate_up", 8, 22, WIDTH), c.matrix("down", 8, WIDTH, 11))
    biases = (c.weight("up_bias", 8, 22), c.weight("down_bias", 8, WIDTH))
    weight = c.op("gather", scores, index, dim=1)
    gate = {"act": "silu", "alpha": 1.7, "limit": 0.5, "shift": 1.0}
    return c.op("moe", c.x, index, weight, *experts, *biases, **gate)


def tied(c: Case) -> Value:
    return c.op("linear", c.x, WeightRef("table"))


def rotary(c: Case) -> Value:
    cos, sin = (c.op("embedding", c.weight(name, 64, 3), c.positions) for name in ("cos", "sin"))
    heads = c.op("reshape", c.op("slice", c.x, dim=1, start=1, stop=WIDTH), shape=("T", 4, 9))
    half = c.op("rope", heads, cos, sin, style="half", rotary_dim=6)
    both = c.op("rope", half, cos, sin, style="interleaved", rotary_dim=6)
    return c.op("reshape", both, shape=("T", 36))


def middle_reductions(c: Case) -> Value:
    cube = c.op("reshape", c.op("slice", c.x, dim=1, start=1, stop=WIDTH), shape=("T", 4, 9))
    y = c.op("sub", cube, c.op("mean", cube, dims=(1,), keepdim=True))
    y = c.op("add", y, c.op("amax", cube, dims=(1, 2), keepdim=True))
    return c.op("reshape", y, shape=("T", 36))


def whole_numbers(c: Case) -> Value:
    whole = c.op("cast", c.op("mul", c.x, 100.0), dtype="i64")
    most = c.op("amax", c.op("abs", whole), dims=(1,), keepdim=True)
    return c.op("sub", c.x, c.op("mul", c.op("cast", most, dtype=c.dtype.value), 0.01))


def infinities(c: Case) -> Value:
    low = c.op("full", shape=("T", WIDTH), value=float("-inf"), dtype=c.dtype.value)
    return c.op("exp", c.op("where", c.op("gt", c.x, 0.0), c.x, low))


def shifted_rotary(c: Case) -> Value:
    frequencies = c.b.weight("frequencies", TensorType(DType.F32, (3,)))
    heads = c.op("reshape", c.op("slice", c.x, dim=1, start=1, stop=WIDTH), shape=("T", 4, 9))
    later = c.op("add", c.positions, 7)
    cos, sin = (
        c.op("rotary", later, frequencies, function=name, scale=1.5) for name in ("cos", "sin")
    )
    turned = c.op("rope", heads, cos, sin, style="half", rotary_dim=6)
    return c.op("reshape", turned, shape=("T", 36))


def heads_first(c: Case) -> Value:
    heads = c.op("reshape", c.op("slice", c.x, dim=1, start=1, stop=WIDTH), shape=("T", 4, 9))
    first = c.op("transpose", heads, perm=(1, 0, 2))
    normed = c.op("rms_norm", first, c.weight("n", 9), eps=1e-6)
    normed = c.op("rms_norm", c.op("neg", normed), c.weight("n", 9), eps=1e-6)
    return c.op("reshape", c.op("transpose", normed, perm=(1, 0, 2)), shape=("T", 36))


CASES: list[Callable[[Case], Value]] = [
    pointwise,
    elementary,
    row_norm,
    reductions,
    views,
    parts_of_heads,
    linear_bias,
    norms,
    gates,
    routing,
    grouped_routing,
    tied,
    rotary,
    middle_reductions,
    whole_numbers,
    infinities,
    shifted_rotary,
    heads_first,
]


def program_of(make: Callable[[Case], Value], dtype: DType, held: DType | None = None) -> Program:
    case = Case(dtype, held)
    result = make(case)
    case.b.outputs = [result]
    width = int(str(result.type.shape[-1]))
    program = case.b.build()
    program = replace(program, spec=replace(program.spec, vocab_size=width))
    return with_weights(program, random_weights(program, seed=3))


def sum_of_one(c: Case) -> Value:
    column = c.op("neg", c.op("slice", c.x, dim=1, start=0, stop=1))
    return c.op("mul", c.x, c.op("sum", column, dims=(1,), keepdim=True))
