"""Routed experts, against their definition written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional as F

from infc.ir.errors import ProgramError
from infc.ir.ops import get_op
from infc.ir.program import Attr
from infc.ir.types import DType, Sym, TensorType

Gate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

ALPHA, LIMIT = 1.702, 0.8
GATES: dict[str, tuple[dict[str, float | str], Gate]] = {
    "limited": (
        {"act": "silu", "alpha": ALPHA, "limit": LIMIT, "shift": 1.0},
        lambda g, u: (
            (u.clamp(-LIMIT, LIMIT) + 1)
            * g.clamp(max=LIMIT)
            * torch.sigmoid(ALPHA * g.clamp(max=LIMIT))
        ),
    ),
    "limit alone": (
        {"act": "gelu", "limit": LIMIT},
        lambda g, u: u.clamp(-LIMIT, LIMIT) * F.gelu(g.clamp(max=LIMIT)),
    ),
    "plain": ({"act": "silu"}, lambda g, u: F.silu(g) * u),
}


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("biases", [False, True])
def test_gates_and_biases_are_those_written_out(name: str, biases: bool) -> None:
    torch.manual_seed(1)
    attrs, gate = GATES[name]
    x, up, down = (torch.randn(*s, dtype=torch.float64) for s in ((5, 8), (4, 12, 8), (4, 8, 6)))
    index = torch.stack([torch.randperm(4)[:2] for _ in range(5)])
    weight = torch.rand(5, 2, dtype=torch.float64)
    extra = [torch.randn(4, 12).double(), torch.randn(4, 8).double()] if biases else []
    wanted = torch.zeros_like(x)
    for t in range(5):
        for slot in range(2):
            e = int(index[t, slot])
            both = up[e] @ x[t] + (extra[0][e] if biases else 0)
            y = down[e] @ gate(both[:6], both[6:]) + (extra[1][e] if biases else 0)
            wanted[t] += weight[t, slot] * y
    op = get_op("moe")
    got = op.meaning(x, index, weight, up, down, *extra, **op.complete(attrs, []))
    torch.testing.assert_close(got, wanted)


def test_a_gate_without_meaning_is_refused() -> None:
    t = Sym("T")
    shapes = ((t, 2), (4, 12, 8), (4, 8, 6))
    weight, up, down = (TensorType(DType.F32, shape) for shape in shapes)
    types = (TensorType(DType.F32, (t, 8)), TensorType(DType.I64, (t, 2)), weight, up, down)
    wrong: list[dict[str, Attr]] = [{"act": "gelu", "alpha": 2.0}, {"act": "silu", "limit": 0.0}]
    for attrs in wrong:
        with pytest.raises(ProgramError, match=r"moe: (alpha|limit)"):
            get_op("moe").infer(types, attrs)
