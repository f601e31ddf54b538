"""Each converter against torch itself, and what must be refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from infc.frontend.aten import CONVERTERS
from infc.ir.errors import UnsupportedModelError
from infc.ir.types import DType

from .exported import FEATURES, Body, Features, both, program_of

f32, i64 = torch.float32, torch.int64


def _in_place(m: Features, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y /= y.abs().sum(-1, keepdim=True)
    y += 1
    return y


def _topk(m: Features, x: torch.Tensor) -> torch.Tensor:
    values, indices = torch.topk(x, 3)
    values /= values.sum(-1, keepdim=True)
    return torch.cat([values, indices.to(values.dtype)], -1)


def _gather(m: Features, x: torch.Tensor) -> torch.Tensor:
    index = torch.topk(x, 3).indices
    return x.gather(-1, index) + x.scatter(-1, index, 0.3).scatter_(-1, index[..., :1], 2)[..., :3]


def _split_sizes(m: Features, x: torch.Tensor) -> torch.Tensor:
    a, b, c = x.split([1, 4, 3], dim=-1)
    return torch.cat([c, a, b], -1)


def _heads(m: Features, x: torch.Tensor) -> torch.Tensor:
    heads = x.view(1, -1, 2, 4).transpose(1, 2)
    wide = heads[:, :, None].expand(1, 2, 3, heads.shape[2], 4).reshape(1, 6, -1, 4)
    return wide.permute(0, 2, 1, 3).flatten(2)


def _filled_parts(m: Features, x: torch.Tensor) -> torch.Tensor:
    whole = x.new_empty(*x.shape[:-1], 12)
    whole[..., 4:].copy_(x)
    whole[..., :4].copy_(-x[..., 4:])
    return whole.cos()


def _complex(m: Features, x: torch.Tensor) -> torch.Tensor:
    angles = x[..., :4].float()
    turn = torch.polar(torch.ones_like(angles) * 1.5, angles) * 0.5
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], 4, 2))
    turned = torch.view_as_real((pairs * turn).unsqueeze(-3).to(x.device) * angles)
    return turned.flatten(-2).squeeze(-3).type_as(x)


BODIES: dict[str, Body] = {
    "parts of an empty tensor": _filled_parts,
    "complex numbers": _complex,
    "mixed float types": lambda m, x: x.float() * m.constant + x,
    "integer and float": lambda m, x: x + torch.ones(FEATURES, dtype=i64),
    "scalar buffer": lambda m, x: x * m.scalar.to(m.table.dtype) - m.scalar,
    "int tensor and float scalar": lambda m, x: x + (x > 0).to(i64) * 0.5,
    "true division of integers": lambda m, x: x + (x > 0).to(i64) / 4,
    "floor division": lambda m, x: torch.div(x * 9, 4, rounding_mode="floor"),
    "add with alpha": lambda m, x: torch.add(x, m.row, alpha=3),
    "reflected subtraction": lambda m, x: 1 - x,
    "powers": lambda m, x: x.pow(3) + x.abs() ** 0.5 + 2.0**x,
    "unary": lambda m, x: x.abs().sqrt().exp().log() + x.sin() - x.cos() + (-x).erf() + x.floor(),
    "activations": lambda m, x: F.silu(x) + x.relu() + x.tanh() + x.sigmoid() + F.softplus(x),
    "expm1": lambda m, x: torch.expm1(x * 8) + torch.expm1(x * 1e-4) * 1e4,
    "gelu": lambda m, x: F.gelu(x) + F.gelu(x, approximate="tanh"),
    "reciprocal": lambda m, x: x.reciprocal() + torch.rsqrt(x.square()),
    "clamp": lambda m, x: x.clamp(-0.5, 0.5) + x.clamp(min=0.1) + x.clamp(max=0.2),
    "comparisons": lambda m, x: torch.where((x > 0) & ~(x >= 1), x, x.eq(0).to(x.dtype)),
    "where with scalars": lambda m, x: torch.where(x < 0, 0.0, 1.0).to(x.dtype) + x,
    "masked fill": lambda m, x: x.masked_fill(x > 0, -1.0),
    "maximum": lambda m, x: torch.maximum(x, m.row) + torch.minimum(x, m.row),
    "in place": _in_place,
    "topk": _topk,
    "gather and scatter": _gather,
    "softmax": lambda m, x: x.softmax(-1) + F.softmax(x, dim=-1, dtype=f32).to(x.dtype),
    "reductions": lambda m, x: x + x.sum(-1, keepdim=True) + x.mean(2, True) + x.amax(-1, True),
    "max over a dimension": lambda m, x: x + x.max(-1, keepdim=True).values,
    "places of the largest": lambda m, x: (
        x * x.max(-1, keepdim=True).indices + x.max(-1)[1][..., None]
    ),
    "clamp by tensors": lambda m, x: x.clamp(min=m.row, max=m.row.abs()) + x.clamp(max=m.row),
    "layer norm": lambda m, x: F.layer_norm(x, (FEATURES,), m.row, m.row, 1e-3),
    "layer norm without weight": lambda m, x: F.layer_norm(x, (FEATURES,)),
    "linear": lambda m, x: F.linear(x, m.square, m.row),
    "linear of a widened matrix": lambda m, x: F.linear(x.float(), m.square.float(), m.row.float()),
    "addmm": lambda m, x: torch.addmm(m.row, x[0], m.square)[None],
    "matmul by a weight": lambda m, x: x @ m.square,
    "matmul by a transposed weight": lambda m, x: x @ m.square.T,
    "a transposed weight": lambda m, x: x * m.square.T[2],
    "matmul of values": lambda m, x: (x[..., None] @ x[..., None, :] @ x[..., None])[..., 0],
    "heads": _heads,
    "slices": lambda m, x: torch.cat([x[..., 4:], -x[..., :4], x[..., -2:], x[..., ::3]], -1),
    "chunk": lambda m, x: torch.cat(x.chunk(3, -1)[::-1], -1),
    "split": lambda m, x: torch.cat(x.split(3, -1)[::-1], -1),
    "split by sizes": _split_sizes,
    "select": lambda m, x: x * x[..., 2:3] + x[..., -1].unsqueeze(-1),
    "broadcast": lambda m, x: torch.broadcast_to(x[..., :1], x.shape) * x,
    "stack and unbind": lambda m, x: torch.stack(x.unbind(-1)[::2], -1).repeat_interleave(2, -1),
    "rows of a table": lambda m, x: m.table[(x[..., 0] > 0).to(i64)] + x,
    "one feature by a constant": lambda m, x: x * x[..., [-2]] + x[..., [3, 4]].sum(-1, True),
    "index along features": lambda m, x: x.index_select(-1, torch.tensor([3, 1, 1])),
    "created": lambda m, x: x + torch.zeros_like(x) + torch.ones(FEATURES) + torch.arange(8) * 0.5,
    "full": lambda m, x: x * torch.full((FEATURES,), 2.0) + torch.full_like(x, 3.0),
    "dropout off": lambda m, x: F.dropout(x, 0.5, training=False).contiguous().clone(),
    "dead code": lambda m, x: (x.sort(-1), x)[1],
    "literals fold": lambda m, x: x * ((-m.scalar) ** 2).to(x.dtype),
    "transposed twice": lambda m, x: F.linear(x @ m.square, m.square),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", BODIES)
def test_program_gives_what_torch_gives(name: str, dtype: torch.dtype) -> None:
    got, expected = both(BODIES[name], dtype)
    assert got.dtype == expected.dtype
    rtol = 1e-6 if expected.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol)


def test_a_matrix_that_is_widened_stays_a_weight() -> None:
    """Routers compute in float32; what the file has in bfloat16 is rounded first all the same."""
    program = program_of(
        Features(lambda m, x: F.linear(x.float(), m.square.float()), torch.bfloat16)
    )
    (linear,) = (node for node in program.nodes if node.op == "linear")
    (weight,) = linear.weights()
    assert program.weights[weight.name].type.dtype is DType.F32
    assert program.weights[weight.name].expr.op == "cast"


def test_a_product_with_a_transposed_parameter_is_one_with_the_stored_matrix() -> None:
    """Falcon writes `x @ weight.T`: only a stored matrix can be quantized."""
    program = program_of(Features(lambda m, x: x @ m.square.T, torch.float32))
    (linear,) = (node for node in program.nodes if node.op == "linear")
    (weight,) = linear.weights()
    assert program.weights[weight.name].expr.op == "checkpoint"
    assert not any(node.op in ("matmul", "transpose") for node in program.nodes)


def test_every_converter_is_an_overload_of_its_name() -> None:
    """A name that torch does not know would never be found in a graph."""
    ours = {"attention.default", "moe.default"}
    for name in CONVERTERS:
        packet, _, overload = name.partition(".")
        library: Any = torch.ops.infc if name in ours else torch.ops.aten
        assert hasattr(getattr(library, packet), overload), name


def _writes_to_view(m: Features, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y[..., :4].add_(1)
    return y


def _writes_to_input_of_view(m: Features, x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    part = y[..., :4]
    y.mul_(3)
    return part


def _half_filled(m: Features, x: torch.Tensor) -> torch.Tensor:
    whole = torch.empty_like(x)
    whole[..., :4].copy_(x[..., :4])
    return whole


def _read_before_filled(m: Features, x: torch.Tensor) -> torch.Tensor:
    whole = torch.empty_like(x)
    early = whole * 2
    whole[..., :].copy_(x)
    return early + whole


REFUSED: dict[str, tuple[Body, str]] = {
    "half of an empty tensor": (_half_filled, "modifies memory"),
    "an empty tensor read": (_read_before_filled, "not supported|modifies memory"),
    "complex powers": (
        lambda m, x: torch.view_as_real(torch.polar(x, x).sqrt())[..., 0],
        "sqrt.default of complex numbers",
    ),
    "unknown op": (lambda m, x: torch.special.i0(x), "i0.*not supported"),
    "dropout": (lambda m, x: F.dropout(x, 0.5, training=True), "dropout"),
    "view written to": (_writes_to_view, "modifies memory"),
    "view read later": (_writes_to_input_of_view, "modifies memory"),
    "smallest": (lambda m, x: torch.topk(x, 2, largest=False).values, "largest first"),
    "argmax": (lambda m, x: x * x.max(1, keepdim=True).indices, "last dimension"),
    "two indices": (lambda m, x: x[torch.tensor([0]), torch.tensor([0])][None], "several"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    body, reason = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=reason):
        program_of(Features(body, torch.float32))
