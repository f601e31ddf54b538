"""Hypothesis strategies: random small programs that verify and run, and data to run them on."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from hypothesis import strategies as st

from infc.ir.builder import ProgramBuilder
from infc.ir.program import ModelSpec, Operand, Program, Value, WeightRef
from infc.ir.torch_types import to_torch
from infc.ir.types import DType, Sym, TensorType, evaluate_dim

WIDTH = 8
"""Elements of a row of the programs' main values, `[T, WIDTH]`."""

_UNARY = ("neg", "abs", "tanh", "sigmoid", "relu", "silu", "gelu", "sin", "cos", "erf", "floor")
_BINARY = ("add", "sub", "mul", "maximum", "minimum")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


class _Draft:
    """A program being drawn: the builder, and the `[T, WIDTH]` values made so far."""

    def __init__(self, draw: st.DrawFn, dtype: DType) -> None:
        self.draw = draw
        self.dtype = dtype
        self.builder = ProgramBuilder("random", ModelSpec("random", 1, WIDTH, 2, 1, 4, 16, 64))
        self.builder.symbol("T", 1, 64)
        self.rows: list[Value] = []

    def pick(self) -> Value:
        return self.draw(st.sampled_from(self.rows[-4:]))

    def weight(self, *shape: int) -> WeightRef:
        # Few names, so that equal reads happen.
        number = self.draw(st.integers(0, 1))
        name = "w" + "x".join(map(str, shape)) + f".{number}"
        return self.builder.weight(name, TensorType(self.dtype, shape))


def _unary(d: _Draft) -> Value:
    return d.builder.emit(d.draw(st.sampled_from(_UNARY)), d.pick())


def _binary(d: _Draft) -> Value:
    choices: list[Operand] = [d.pick(), d.weight(WIDTH), 0.5, -2.0, 1.0, 0.0]
    pair: list[Operand] = [d.pick(), d.draw(st.sampled_from(choices))]
    if d.draw(st.booleans()):
        pair.reverse()
    return d.builder.emit(d.draw(st.sampled_from(_BINARY)), *pair)


def _where(d: _Draft) -> Value:
    x, y = d.pick(), d.pick()
    test = d.builder.emit(
        d.draw(st.sampled_from(_COMPARISONS)), x, d.draw(st.just(y) | st.just(0.25))
    )
    return d.builder.emit("where", test, x, y)


def _views(d: _Draft) -> Value:
    """There and back: the shape returns to [T, WIDTH]."""
    x, b, token = d.pick(), d.builder, Sym("T")
    choice = d.draw(st.integers(0, 3))
    if choice == 0:
        y = b.emit("reshape", x, shape=(token, 2, WIDTH // 2))
        return b.emit("reshape", y, shape=(token, WIDTH))
    if choice == 1:
        y = b.emit("reshape", x, shape=(1, token, WIDTH))
        return b.emit("reshape", y, shape=(token, WIDTH))
    if choice == 2:
        y = b.emit("transpose", x, perm=(1, 0))
        return b.emit("transpose", y, perm=(1, 0))
    left = b.emit("slice", x, dim=1, start=0, stop=WIDTH // 2)
    right = b.emit("slice", x, dim=1, start=WIDTH // 2, stop=None)
    return b.emit("concat", right, left, dim=1)


def _cast(d: _Draft) -> Value:
    y = d.builder.emit("cast", d.pick(), dtype=d.draw(st.sampled_from(["f32", "f64", "bf16"])))
    return d.builder.emit("cast", y, dtype=d.dtype)


def _reduce(d: _Draft) -> Value:
    op = d.draw(st.sampled_from(["sum", "mean", "amax"]))
    total = d.builder.emit(op, d.pick(), dims=(1,), keepdim=True)
    return d.builder.emit("sub", d.pick(), total)


def _row(d: _Draft) -> Value:
    return d.builder.emit(d.draw(st.sampled_from(["softmax", "cumsum"])), d.pick(), dim=1)


def _linear(d: _Draft) -> Value:
    bias = [d.weight(WIDTH)] if d.draw(st.booleans()) else []
    return d.builder.emit("linear", d.pick(), d.weight(WIDTH, WIDTH), *bias)


def _rms_norm(d: _Draft) -> Value:
    flag = d.draw(st.booleans())
    return d.builder.emit("rms_norm", d.pick(), d.weight(WIDTH), eps=1e-5, round_before_scale=flag)


def _layer_norm(d: _Draft) -> Value:
    bias = [d.weight(WIDTH)] if d.draw(st.booleans()) else []
    return d.builder.emit("layer_norm", d.pick(), d.weight(WIDTH), *bias, eps=1e-5)


def _add_norm(d: _Draft) -> Value:
    inputs = (d.pick(), d.pick(), d.weight(WIDTH))
    node = d.builder.add("add_rms_norm", inputs, {"eps": 1e-6})
    d.rows.append(node.outputs[1])
    return node.outputs[0]


def _gated(d: _Draft) -> Value:
    both = d.builder.emit("concat", d.pick(), d.pick(), dim=1)
    act = d.draw(st.sampled_from(["silu", "gelu", "gelu_tanh", "relu"]))
    return d.builder.emit("gated_act", both, act=act)


def _attention(d: _Draft) -> Value:
    token, b = Sym("T"), d.builder
    q = b.emit("reshape", d.pick(), shape=(token, 2, WIDTH // 2))
    k = b.emit("reshape", d.pick(), shape=(token, 2, WIDTH // 2))
    window = d.draw(st.none() | st.integers(1, 5))
    out = b.emit("attention", q, k, k, layer=0, scale=0.5, window=window)
    return b.emit("reshape", out, shape=(token, WIDTH))


_STEPS: tuple[Callable[[_Draft], Value], ...] = (
    _unary,
    _binary,
    _where,
    _views,
    _cast,
    _reduce,
    _row,
    _linear,
    _rms_norm,
    _layer_norm,
    _add_norm,
    _gated,
    _attention,
)


@st.composite
def programs(
    draw: st.DrawFn, max_nodes: int = 12, dtypes: tuple[DType, ...] = (DType.F32,)
) -> Program:
    """A program over `ids[T]` and `x[T, WIDTH]` that verifies in phase captured and runs.

    It may hold dead code, equal nodes and views that undo each other, as captures do. Its outputs
    have names, or none.
    """
    d = _Draft(draw, draw(st.sampled_from(dtypes)))
    ids = d.builder.input("ids", TensorType(DType.I64, (Sym("T"),)))
    d.rows.append(d.builder.input("x", TensorType(d.dtype, (Sym("T"), WIDTH))))
    d.rows.append(d.builder.emit("embedding", d.weight(16, WIDTH), ids))
    for layer in range(draw(st.integers(0, max_nodes))):
        d.builder.layer = draw(st.sampled_from([None, layer % 2]))
        d.rows.append(draw(st.sampled_from(_STEPS))(d))
    outputs = draw(st.lists(st.sampled_from(d.rows[1:]), min_size=1, max_size=2, unique=True))
    names = st.lists(st.text(max_size=3), min_size=2, max_size=2, unique=True)
    if draw(st.booleans()):
        d.builder.output(**dict(zip(draw(names), outputs, strict=False)))
    else:
        d.builder.output(*outputs)
    return d.builder.build()


def sample(kind: TensorType, bindings: dict[str, int], seed: str) -> torch.Tensor:
    """Random data of a type: floats of about unit size, whole numbers from 0 to 15."""
    generator = torch.Generator().manual_seed(random.Random(seed).getrandbits(31))
    shape = [evaluate_dim(dim, bindings) for dim in kind.shape]
    if kind.dtype.is_float:
        return torch.randn(shape, generator=generator).to(to_torch(kind.dtype))
    return torch.randint(0, 16, shape, generator=generator).to(to_torch(kind.dtype))


def sample_inputs(program: Program, tokens: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs for a program, with that many tokens."""
    bindings = dict.fromkeys(program.symbols, tokens)
    return {v.name: sample(v.type, bindings, f"{seed}{v.name}") for v in program.inputs}


def sample_weights(program: Program, seed: int = 0) -> Callable[[str], torch.Tensor]:
    """A source of random weights for a program, by name; the same name gives the same tensor."""
    return lambda name: sample(program.weights[name].type, {}, f"{seed}@{name}")
