"""Each op's type rule and meaning, against torch, transformers or arithmetic written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from infc.ir.errors import ProgramError
from infc.ir.ops import PHASES, all_ops, get_op
from infc.ir.ops.base import OperandType
from infc.ir.torch_types import from_torch
from infc.ir.types import DType, Sym, TensorType

T = Sym("T")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def run(name: str, *inputs: Any, **attrs: Any) -> Any:
    """The op on real tensors, its result types checked against the type rule."""
    op = get_op(name)
    types: list[OperandType] = [
        TensorType(from_torch(x.dtype), tuple(x.shape)) if isinstance(x, torch.Tensor) else x
        for x in inputs
    ]
    full = op.complete(attrs, types)
    declared = op.infer(types, full)
    result = op.meaning(*inputs, **op.resolve(full, {}))
    results = result if isinstance(result, tuple) else (result,)
    for kind, value in zip(declared, results, strict=True):
        assert value is not None
        assert kind == TensorType(from_torch(value.dtype), tuple(value.shape))
    return result


def refuse(match: str, name: str, *types: OperandType, **attrs: Any) -> None:
    with pytest.raises(ProgramError, match=match):
        get_op(name).infer(types, attrs)


def f32(*shape: Any) -> TensorType:
    return TensorType(DType.F32, shape)


@pytest.mark.parametrize("op", all_ops(), ids=lambda op: op.name)
def test_every_op_is_documented_and_legal_somewhere(op: Any) -> None:
    assert len(op.doc) > 3
    assert op.phases
    assert op.phases <= set(PHASES)
    optional = [name.endswith("?") for name in op.operands]
    assert optional == sorted(optional), "optional operands come last"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("exp", torch.exp),
        ("log", lambda x: torch.log(x)),
        ("sqrt", torch.sqrt),
        ("rsqrt", lambda x: 1 / x.sqrt()),
        ("reciprocal", lambda x: 1 / x),
        ("sigmoid", lambda x: 1 / (1 + (-x).exp())),
        ("silu", lambda x: x / (1 + (-x).exp())),
        ("softplus", lambda x: (1 + x.exp()).log()),
        ("tanh", lambda x: 1 - 2 / ((2 * x).exp() + 1)),
        ("neg", lambda x: 0 - x),
        ("erf", lambda x: 2 * torch.distributions.Normal(0, 0.5**0.5).cdf(x) - 1),
        ("gelu", lambda x: x * torch.distributions.Normal(0, 1).cdf(x)),
        ("floor", lambda x: x - x % 1),
        ("relu", lambda x: x.clamp(0)),
        ("abs", lambda x: (x * x).sqrt()),
        ("sin", lambda x: (x - math.pi / 2).cos()),
        ("cos", lambda x: (x + math.pi / 2).sin()),
    ],
)
def test_unary_ops_mean_what_their_formula_says(name: str, wanted: Any) -> None:
    x = torch.linspace(0.1, 5, 40, dtype=torch.float64)
    torch.testing.assert_close(run(name, x), wanted(x))


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "pow", "maximum", "minimum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_literal_may_stand_on_either_side(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor([0.5, 1.0, 3.0], dtype=dtype)
    two = torch.tensor(2.0, dtype=dtype)
    assert torch.equal(run(name, x, 2.0), run(name, x, two))
    assert torch.equal(run(name, 2.0, x), run(name, two, x))
    assert run(name, x, 2).dtype == dtype


def test_comparisons_and_logic_give_bool() -> None:
    x, y = torch.tensor([1, 2, 3]), torch.tensor([2, 2, 2])
    assert run("lt", x, y).tolist() == [True, False, False]
    assert run("ge", x, 2).tolist() == [False, True, True]
    assert run("ne", 2, x).tolist() == [True, False, True]
    both = run("logical_and", run("le", x, y), run("logical_not", run("eq", x, y)))
    assert both.tolist() == [True, False, False]
    assert run("logical_or", both, torch.tensor([False, False, True])).tolist() == [
        True,
        False,
        True,
    ]
    assert run("where", both, 1.5, torch.zeros(3)).tolist() == [1.5, 0.0, 0.0]


def test_types_never_promote_silently() -> None:
    refuse("mixed", "add", f32(T), TensorType(DType.BF16, (T,)))
    refuse("mixed", "mul", f32(T), TensorType(DType.I64, ()))
    refuse("does not fit", "add", TensorType(DType.I64, (T,)), 0.5)
    refuse("does not fit", "mul", f32(T), True)
    refuse("literals", "add", 1.0, 2.0)
    refuse("floating", "exp", TensorType(DType.I32, (T,)))
    refuse("bool", "logical_not", f32(T))
    refuse("bool", "where", f32(T), f32(T), f32(T))
    refuse("broadcast", "add", f32(T, 3), f32(T, 4))
    refuse("mixed", "concat", f32(T), TensorType(DType.F16, (T,)), dim=0)
    assert get_op("mul").infer([TensorType(DType.BF16, (T,)), f32()], {}) == (
        TensorType(DType.BF16, (T,)),
    )


@pytest.mark.parametrize(
    ("shape", "target", "fits"),
    [
        ((T, 8, 64), ("T", 512), True),
        ((T, 512), ("T", 8, 64), True),
        ((T, 8, 64), ("8*T", 64), True),
        ((1, T, 4), ("T", 4), True),
        ((Sym("T", 2, 2), 3), ("T+1", 6), True),
        ((T, 8, 64), ("T", 511), False),
        ((T, 4), ("R", 4), False),
        ((T, T), ("2*T",), False),
    ],
)
def test_reshape_keeps_the_symbolic_product(shape: Any, target: Any, fits: bool) -> None:
    if fits:
        assert get_op("reshape").infer([f32(*shape)], {"shape": target})
    else:
        refuse("cannot reshape", "reshape", f32(*shape), shape=target)


@given(st.integers(1, 6), st.none() | st.integers(-8, 8), st.none() | st.integers(-8, 8), st.data())
def test_slices_are_those_of_python(
    size: int, start: int | None, stop: int | None, data: st.DataObject
) -> None:
    step = data.draw(st.integers(1, 3))
    x = torch.arange(size * 2).reshape(2, size)
    attrs = {"dim": -1, "start": start, "stop": stop, "step": step}
    assert torch.equal(run("slice", x, **attrs), x[:, start:stop:step])


def test_slices_of_symbolic_dimensions() -> None:
    op = get_op("slice")
    assert op.infer([f32(T, 4)], {"dim": 0, "start": 1}) == (f32(Sym("T", 1, -1), 4),)
    assert op.infer([f32(T, 4)], {"dim": 0, "start": -1}) == (f32(1, 4),)
    assert op.infer([f32(T)], {"dim": 0, "stop": 2**63 - 1}) == (f32(T),)
    assert op.infer([f32(Sym("T", 2))], {"dim": 0, "stop": "T"}) == (f32(T),)
    assert op.infer([f32(Sym("T", 2))], {"dim": 0, "step": 2}) == (f32(T),)
    refuse("past the end", "slice", f32(T), dim=0, stop=2)
    refuse("step", "slice", f32(4), dim=0, step=0)


def test_views_and_creation() -> None:
    x = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(run("transpose", x, perm=(1, 0)), x.T)
    assert torch.equal(run("expand", x[:, :1], shape=(4, 2, 3)), x[:, :1].expand(4, 2, 3))
    assert torch.equal(run("concat", x, x, dim=-1), torch.cat([x, x], 1))
    assert torch.equal(run("reshape", x, shape=[3, 2]), x.reshape(3, 2))
    assert run("iota", size=3, dtype="i32").tolist() == [0, 1, 2]
    assert run("full", shape=(2,), value=float("-inf"), dtype="bf16").tolist() == [-math.inf] * 2
    refuse("fit", "full", shape=(2,), value=0.5, dtype="i64")
    refuse("permute", "transpose", f32(2, 3), perm=(0,))
    refuse("twice", "transpose", f32(2, 3), perm=(0, 0))
    refuse("expand", "expand", f32(2), shape=(3,))
    assert get_op("concat").infer([f32(T, 2), f32(T, 2)], {"dim": 0}) == (f32(Sym("T", 2), 2),)


@pytest.mark.parametrize("name", ["sum", "mean", "amax"])
def test_reductions_of_16_bits_round_once(name: str) -> None:
    x = torch.randn(3, 400, dtype=torch.float32).bfloat16()
    wanted = getattr(torch, name)(x.double(), dim=(1,), keepdim=True).bfloat16()
    torch.testing.assert_close(run(name, x, dims=(-1,), keepdim=True), wanted, rtol=1e-2, atol=0)
    assert run(name, x, dims=(0, 1)).shape == ()


def test_topk_gives_ties_to_the_lower_index() -> None:
    values, indices = run("topk", torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0]]), k=4)
    assert values.tolist() == [[3.0, 3.0, 3.0, 1.0]]
    assert indices.tolist() == [[1, 2, 4, 0]]
    refuse("largest", "topk", f32(T, 3), k=4)


def test_softmax_and_cumsum() -> None:
    x = torch.randn(4, 9)
    torch.testing.assert_close(run("softmax", x, dim=0), x.exp() / x.exp().sum(0))
    assert run("cumsum", torch.tensor([1, 2, 3]), dim=0).tolist() == [1, 3, 6]


def test_gather_ops_pick_rows() -> None:
    table = torch.randn(5, 3)
    ids = torch.tensor([[4, 0], [1, 1]])
    assert torch.equal(run("embedding", table, ids), F.embedding(ids, table))
    assert torch.equal(run("take", table, ids, dim=0), table[ids])
    assert torch.equal(run("take", table, ids[1], dim=1), table[:, [1, 1]])
    refuse("i32 or i64", "take", f32(4), f32(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_accumulate_wide_and_round_once(dtype: torch.dtype) -> None:
    x, w, b = (torch.randn(*s).to(dtype) for s in ((5, 2, 64), (3, 64), (3,)))
    exact = (x.double() @ w.double().T + b.double()).to(dtype)
    limit = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(run("linear", x, w, b), exact, rtol=limit, atol=limit / 10)
    y = torch.randn(1, 64, 7).to(dtype)
    exact = (x.double() @ y.double()).to(dtype)
    torch.testing.assert_close(run("matmul", x, y), exact, rtol=limit, atol=limit / 10)
    refuse("differ", "linear", f32(T, 8), f32(4, 7))
    refuse("mixed", "linear", TensorType(DType.BF16, (T, 8)), f32(4, 8))
    refuse("mixed", "linear", TensorType(DType.F64, (T, 8)), TensorType(DType.BF16, (4, 8)))
    refuse("against", "matmul", f32(T, 8), f32(7, 3))


def test_rows_of_float32_are_rounded_to_the_matrix_they_meet() -> None:
    x, w, b = torch.randn(5, 64), torch.randn(3, 64).bfloat16(), torch.randn(3)
    kinds = [f32(T, 64), TensorType(DType.BF16, (3, 64)), f32(3)]
    assert get_op("linear").infer(kinds, {}) == (f32(T, 3),)
    expected = F.linear(x.bfloat16().float(), w.float(), b)
    assert torch.equal(run("linear", x, w, b), expected)
    assert not torch.equal(F.linear(x, w.float(), b), expected)
    gate_up, down = torch.randn(2, 6, 64).bfloat16(), torch.randn(2, 64, 3).bfloat16()
    index, weight = torch.zeros(5, 1, dtype=torch.long), torch.ones(5, 1)
    gate, up = F.linear(x.bfloat16().float(), gate_up[0].float()).chunk(2, -1)
    gated = (F.silu(gate) * up).bfloat16().float()
    expected = F.linear(gated, down[0].float())
    torch.testing.assert_close(run("moe", x, index, weight, gate_up, down, act="silu"), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_those_of_the_library(dtype: torch.dtype) -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, w, b, r = (torch.randn(*s).to(dtype) for s in ((4, 32), (32,), (32,), (4, 32)))
    llama, gemma = LlamaRMSNorm(32, 1e-5).to(dtype), Gemma2RMSNorm(32, 1e-5).to(dtype)
    with torch.no_grad():
        llama.weight.copy_(w)
        gemma.weight.copy_(w)
        assert torch.equal(run("rms_norm", x, w, eps=1e-5), llama(x))
        own = run("rms_norm", x, 1 + w.float(), eps=1e-5, round_before_scale=False)
        assert torch.equal(own, gemma(x))
        normed, total = run("add_rms_norm", x, r, w, eps=1e-5)
        assert torch.equal(total, x + r)
        assert torch.equal(normed, llama(x + r))
    exact = F.layer_norm(x.double(), (32,), w.double(), b.double(), 1e-5).to(dtype)
    limit = 1e-5 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(run("layer_norm", x, w, b, eps=1e-5), exact, rtol=limit, atol=limit)
    normed, total = run("add_layer_norm", x, r, w, eps=1e-5)
    assert torch.equal(normed, run("layer_norm", x + r, w, eps=1e-5))
    refuse("expected shape", "rms_norm", f32(T, 8), f32(7), eps=1e-5)
    refuse("missing", "rms_norm", f32(T, 8), f32(8))


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("rotary", [8, 16])
def test_rope_is_that_of_the_library(style: str, rotary: int) -> None:
    from transformers.models.glm import modeling_glm
    from transformers.models.llama import modeling_llama

    q, positions = torch.randn(6, 3, 16), torch.tensor([5, 0, 1, 63, 2, 2])
    frequencies = 10000.0 ** (-torch.arange(rotary // 2) * 2 / rotary)
    rows = [run("rotary", positions, frequencies, function=name) for name in ("cos", "sin")]
    own = run("rope", q, *rows, style=style, rotary_dim=rotary)
    angles = positions[:, None] * frequencies
    cos, sin = (torch.cat([t, t], -1)[None] for t in (angles.cos(), angles.sin()))
    batch = q.transpose(0, 1)[None]
    if style == "interleaved":
        wanted, _ = modeling_glm.apply_rotary_pos_emb(batch, batch, cos, sin)
    else:
        turned, _ = modeling_llama.apply_rotary_pos_emb(
            batch[..., :rotary], batch[..., :rotary], cos, sin
        )
        wanted = torch.cat([turned, batch[..., rotary:]], -1)
    torch.testing.assert_close(own, wanted[0].transpose(0, 1))
    refuse("rotary_dim", "rope", f32(T, 2, 8), f32(T, 8), f32(T, 8), rotary_dim=16)
    refuse("expected shape", "rope", f32(T, 2, 8), f32(9, 4), f32(9, 4), rotary_dim=8)


def attention_by_hand(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, **a: Any
) -> torch.Tensor:
    """One query and one key at a time."""
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=torch.float64)
    for t in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            first = 0 if a["window"] is None else max(0, t - a["window"] + 1)
            last = t if a["causal"] else q.shape[0] - 1
            scores = [float(q[t, h] @ k[j, g]) * a["scale"] for j in range(first, last + 1)]
            if a["softcap"] is not None:
                scores = [a["softcap"] * math.tanh(s / a["softcap"]) for s in scores]
            total = sum(math.exp(s) for s in scores)
            if sinks is not None:
                total += math.exp(float(sinks[h]))
            for j, s in zip(range(first, last + 1), scores, strict=True):
                out[t, h] += math.exp(s) / total * v[j, g]
    return out


@settings(max_examples=25)
@given(st.data())
def test_attention_is_that_written_out(data: st.DataObject) -> None:
    tokens, groups, share = (data.draw(st.integers(1, n)) for n in (9, 2, 3))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    q = torch.randn(tokens, groups * share, 4, dtype=torch.float64)
    k = torch.randn(tokens, groups, 4, dtype=torch.float64)
    v = torch.randn(tokens, groups, 6, dtype=torch.float64)
    sinks = torch.randn(groups * share, dtype=torch.float64) if data.draw(st.booleans()) else None
    attrs = {
        "scale": 0.7,
        "window": data.draw(st.none() | st.integers(1, 10)),
        "softcap": data.draw(st.none() | st.just(1.5)),
        "causal": True,
    }
    operands = (q, k, v) if sinks is None else (q, k, v, sinks)
    own = run("attention", *operands, layer=0, **attrs)
    torch.testing.assert_close(own, attention_by_hand(q, k, v, sinks, **attrs))


def test_attention_refuses_heads_that_do_not_fit() -> None:
    q, kv = f32(T, 4, 8), f32(T, 3, 8)
    refuse("not a multiple", "attention", q, kv, kv, layer=0, scale=1.0)
    refuse("window", "attention", q, q, q, layer=0, scale=1.0, window=0)
    refuse("softcap", "attention", q, q, q, layer=0, scale=1.0, softcap=0.0)
    refuse("sinks", "attention", q, q, q, f32(3), layer=0, scale=1.0)


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("biases", [False, True])
def test_experts_are_those_written_out(act: str, biases: bool) -> None:
    torch.manual_seed(1)
    x, up, down = (torch.randn(*s, dtype=torch.float64) for s in ((5, 8), (4, 12, 8), (4, 8, 6)))
    index = torch.stack([torch.randperm(4)[:2] for _ in range(5)])
    weight = torch.rand(5, 2, dtype=torch.float64)
    extra = [torch.randn(4, 12).double(), torch.randn(4, 8).double()] if biases else []
    functions: dict[str, Any] = {
        "silu": F.silu,
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    }
    wanted = torch.zeros_like(x)
    for t in range(5):
        for slot in range(2):
            e = int(index[t, slot])
            both = up[e] @ x[t] + (extra[0][e] if biases else 0)
            y = down[e] @ (functions[act](both[:6]) * both[6:]) + (extra[1][e] if biases else 0)
            wanted[t] += weight[t, slot] * y
    torch.testing.assert_close(run("moe", x, index, weight, up, down, *extra, act=act), wanted)
    both = torch.cat([x, x], -1)
    torch.testing.assert_close(run("gated_act", both, act=act), functions[act](x) * x)


def test_attributes_are_completed_and_checked() -> None:
    op = get_op("rms_norm")
    attrs = {"eps": 1.0, "round_before_scale": True, "dtype": None}
    assert op.complete({"eps": 1}, [f32(T, 8), f32(8)]) == attrs
    assert isinstance(op.complete({"eps": 1}, [])["eps"], float)
    refuse("no attribute", "rms_norm", f32(T, 8), f32(8), eps=1e-5, epsilon=1)
    refuse("expected a number", "rms_norm", f32(T, 8), f32(8), eps="small")
    refuse("none or tanh", "gelu", f32(T), approximate="quick")
    refuse("takes", "rms_norm", f32(T, 8), eps=1e-5)
    refuse("out of range", "softmax", f32(T, 8), dim=2)
    refuse("min nor max", "clamp", f32(T))
    with pytest.raises(ProgramError, match="rms_norm"):
        get_op("rmsnorm")


def test_costs_count_bytes_and_operations() -> None:
    linear = get_op("linear").cost([f32(T, 8), f32(4, 8)], {}, {"T": 10})
    assert (linear.bytes_read, linear.bytes_written, linear.flops) == (448, 160, 640)
    table = TensorType(DType.BF16, (1000, 8))
    embedding = get_op("embedding").cost([table, TensorType(DType.I64, (T,))], {}, {"T": 3})
    assert embedding.bytes_read == 3 * 8 * 2 + 3 * 8


@pytest.mark.parametrize(
    ("name", "types", "attrs"),
    [
        ("linear", [f32(T, 8), f32(8, 8), f32(8)], {}),
        ("gated_act", [f32(T, 16)], {"act": "silu"}),
        ("rms_norm", [f32(T, 8), f32(8)], {"eps": 1e-5}),
        ("layer_norm", [f32(T, 8), f32(8), f32(8)], {"eps": 1e-5}),
        ("add_rms_norm", [f32(T, 8), f32(T, 8), f32(8)], {"eps": 1e-5}),
        ("add_layer_norm", [f32(T, 8), f32(T, 8), f32(8)], {"eps": 1e-5}),
    ],
)
def test_a_result_can_be_of_a_type_of_its_own(
    name: str, types: list[TensorType], attrs: dict[str, object]
) -> None:
    """Rounded once, behind all that is computed; only the first result."""
    op = get_op(name)
    narrow = op.complete(attrs | {"dtype": "bf16"}, types)
    kinds = op.infer(types, narrow)
    assert kinds[0] == TensorType(DType.BF16, (T, 8))
    assert kinds[1:] == op.infer(types, op.complete(attrs, types))[1:]
    values = [torch.randn([5 if dim == T else int(str(dim)) for dim in k.shape]) for k in types]
    wide, found = (_results(op.meaning(*values, **op.complete(a, types))) for a in (attrs, narrow))
    assert torch.equal(found[0], wide[0].bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(wide[1:], found[1:], strict=True))
    with pytest.raises(ProgramError, match="expected floating point"):
        op.infer(types, op.complete(attrs | {"dtype": "i32"}, types))


def _results(found: Any) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)
