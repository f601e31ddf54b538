"""Attention as captured: one whole sequence, token-major."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..cost import Cost
from ..errors import ProgramError
from ..program import Attr
from ..types import TensorType, evaluate_dim
from .base import (
    BEFORE_LOWERING,
    AttrKind,
    Attrs,
    AttrSpec,
    Kind,
    Op,
    Outputs,
    Types,
    default_cost,
    need_float,
    need_shape,
    same_dtype,
    tensor,
    wide,
)

if TYPE_CHECKING:
    import torch


def check_heads(q: TensorType, k: TensorType) -> None:
    """ProgramError unless the query heads share the KV heads evenly."""
    heads, groups = q.shape[1], k.shape[1]
    if not isinstance(heads, int) or not isinstance(groups, int) or heads % max(groups, 1):
        raise ProgramError(f"{heads} query heads are not a multiple of {groups} KV heads")
    if q.shape[2] != k.shape[2]:
        raise ProgramError(f"q is {q} and k {k}: head sizes differ")


def check_sinks(types: Types, index: int, q: TensorType) -> None:
    """ProgramError unless the optional operand `index` is one logit a query head."""
    if len(types) > index:
        need_shape(need_float(tensor(types, index, 1, "sinks"), "sinks"), q.shape[1:2], "sinks")


def check_limits(attrs: Attrs) -> None:
    """ProgramError for a window or soft-cap that masks everything or divides by zero."""
    window, softcap = attrs["window"], attrs["softcap"]
    if isinstance(window, int) and window < 1:
        raise ProgramError(f"window is {window}, expected at least 1 or none")
    if isinstance(softcap, float) and not softcap > 0:
        raise ProgramError(f"softcap is {softcap}, expected above 0 or none")


def _attention(types: Types, attrs: Attrs) -> Outputs:
    q = need_float(tensor(types, 0, 3, "q"), "q")
    k, v = tensor(types, 1, 3, "k"), tensor(types, 2, 3, "v")
    same_dtype(q, k, v)
    if not q.shape[0] == k.shape[0] == v.shape[0] or k.shape[1] != v.shape[1]:
        raise ProgramError(f"q is {q}, k {k}, v {v}: tokens or KV heads differ")
    check_heads(q, k)
    check_sinks(types, 3, q)
    check_limits(attrs)
    return (TensorType(q.dtype, (*q.shape[:2], v.shape[2])),)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    visible: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Masked attention in at least float32: q `[T, H, D]`, k `[C, G, D]`, visible `[T, C]`."""
    import torch

    group = q.shape[1] // k.shape[1]
    keys, values = (wide(x).to(wide(q).dtype).repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("thd,chd->htc", wide(q), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[0]]
    return torch.einsum("htc,chd->thd", weights, values).to(q.dtype)


def visible_mask(
    queries: torch.Tensor, keys: torch.Tensor, window: int | None, causal: bool = True
) -> torch.Tensor:
    """Which key positions each query position sees, `[T, C]`."""
    import torch

    distance = queries[:, None] - keys[None, :]
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen if window is None else seen & (distance < window)


def _attention_meaning(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    layer: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    causal: bool,
) -> torch.Tensor:
    import torch

    places = torch.arange(q.shape[0], device=q.device)
    visible = visible_mask(places, places, window, causal)
    return attend(q, k, v, sinks, visible, scale, softcap)


def visible_pairs(queries: int, context: int, window: Attr) -> int:
    """How many (query, key) pairs the last `queries` of `context` positions see."""
    widest = window if isinstance(window, int) else context

    def seen_by_first(count: int) -> int:
        rising = min(count, widest)
        return rising * (rising + 1) // 2 + (count - rising) * widest

    return seen_by_first(context) - seen_by_first(context - queries)


def pair_flops(q: TensorType, out: TensorType) -> int:
    """Operations of one (query, key) pair over all heads: a product by the key, one by the value.

    q is `[T, H, D]`, out `[T, H, Dv]`. The softmax's own are left out: they are D times fewer.
    """
    return 2 * sum(TensorType(kind.dtype, kind.shape[1:]).num_elements() for kind in (q, out))


def _attention_cost(types: Types, outs: Outputs, attrs: Attrs, bindings: Mapping[str, int]) -> Cost:
    base = default_cost(types, outs, attrs, bindings)
    q = tensor(types, 0)
    tokens = evaluate_dim(q.shape[0], bindings)
    causal = attrs.get("causal", True)
    pairs = visible_pairs(tokens, tokens, attrs["window"]) if causal else tokens * tokens
    return Cost(base.bytes_read, base.bytes_written, pairs * pair_flops(q, outs[0]))


LIMITS = (
    AttrSpec("scale", AttrKind.FLOAT),
    AttrSpec("window", AttrKind.INT, None, optional=True),
    AttrSpec("softcap", AttrKind.FLOAT, None, optional=True),
)

OPS = (
    Op(
        "attention",
        Kind.ATTENTION,
        "softmax(softcap(q k^T * scale)) v over one sequence, in float32, rounded once: "
        "q[T, H, D], k[T, G, D], v[T, G, Dv] -> [T, H, Dv]. Query p sees keys p - window + 1 .. p; "
        "a sink is one more logit of the head, without a value.",
        ("q", "k", "v", "sinks?"),
        _attention,
        _attention_meaning,
        (AttrSpec("layer", AttrKind.INT), *LIMITS, AttrSpec("causal", AttrKind.BOOL, True)),
        cost_rule=_attention_cost,
        mixer=True,
        phases=BEFORE_LOWERING,
    ),
)
