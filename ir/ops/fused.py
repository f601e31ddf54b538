"""Fused elementwise ops: the gated activation of a feed-forward layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import ProgramError
from ..types import TensorType
from .base import (
    RESULT_DTYPE,
    AttrKind,
    Attrs,
    AttrSpec,
    Kind,
    Op,
    Outputs,
    Types,
    as_result,
    is_token_dim,
    need_float,
    result_dtype,
    tensor,
    wide,
)

if TYPE_CHECKING:
    import torch

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def activate(x: torch.Tensor, act: str) -> torch.Tensor:
    """The activation of that name, elementwise."""
    import torch.nn.functional as F

    if act == "silu":
        return F.silu(x)
    if act == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def _gated_act(types: Types, attrs: Attrs) -> Outputs:
    kind = need_float(tensor(types, 0), "gate_up")
    last = kind.shape[-1] if kind.shape else None
    if not isinstance(last, int) or last % 2:
        raise ProgramError(f"gate_up is {kind}, expected an even last dimension")
    return (TensorType(result_dtype(kind, attrs), (*kind.shape[:-1], last // 2)),)


def gated_act_meaning(gate_up: torch.Tensor, *, act: str, dtype: str | None = None) -> torch.Tensor:
    """act(gate) * up in at least float32, rounded once; gate is the first half."""
    gate, up = wide(gate_up).chunk(2, -1)
    return as_result(activate(gate, act) * up, gate_up, dtype)


def _mixes(types: Types, outs: Outputs, attrs: Attrs, token: str) -> str | None:
    return "multiplies tokens" if is_token_dim(tensor(types, 0).shape[-1], token) else None


OPS = (
    Op(
        "gated_act",
        Kind.FUSED,
        "act(gate) * up of gate_up[.., 2I], gate first -> [.., I] of `dtype`, or else of the type "
        "of gate_up; in float32, rounded once.",
        ("gate_up",),
        _gated_act,
        gated_act_meaning,
        (AttrSpec("act", AttrKind.STR, choices=ACTIVATIONS), RESULT_DTYPE),
        mixes=_mixes,
    ),
)
