"""Ops on paged state: writing keys and values, and attending to what is stored."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

from ..cost import Cost, PagedLoad
from ..errors import ProgramError
from ..paged_state import PagedState
from ..program import Attr
from ..types import TensorType, evaluate_dim
from .attention import (
    LIMITS,
    attend,
    check_limits,
    check_sinks,
    pair_flops,
    visible_mask,
    visible_pairs,
)
from .base import (
    AFTER_LOWERING,
    AttrKind,
    Attrs,
    AttrSpec,
    Kind,
    Op,
    Outputs,
    Types,
    int_attr,
    need_float,
    same_dtype,
    tensor,
)
from .position import ROPE_ATTRS, check_rows, rope_cost, rope_meaning

if TYPE_CHECKING:
    import torch


def cache_of(attrs: Attrs) -> int:
    """The key of the state that a state op reads or writes: its layer, or another one."""
    cache = attrs["cache"]
    return int_attr(attrs, "layer" if cache is None else "cache")


def _key(layer: int, cache: int | None) -> int:
    return layer if cache is None else cache


def _own_cache(types: Types, attrs: dict[str, Attr]) -> dict[str, Attr]:
    """A layer's own cache is not named, as before there were others."""
    return attrs | {"cache": None} if attrs["cache"] == attrs["layer"] else attrs


def _check_kv(k: TensorType, v: TensorType) -> None:
    same_dtype(need_float(k, "k"), v)
    if k.shape[:2] != v.shape[:2]:
        raise ProgramError(f"k is {k} and v {v}: tokens or KV heads differ")


def _kv_write(types: Types, attrs: Attrs) -> Outputs:
    _check_kv(tensor(types, 0, 3, "k"), tensor(types, 1, 3, "v"))
    return ()


def _kv_write_meaning(
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    layer: int,
    cache: int | None,
    group: str,
    state: PagedState,
) -> None:
    state.write(group, _key(layer, cache), k, v)


def _rope_kv_write(types: Types, attrs: Attrs) -> Outputs:
    q, k, v = (tensor(types, i, 3, name) for i, name in enumerate("qkv"))
    _check_kv(k, v)
    same_dtype(q, k)
    if q.shape[0] != k.shape[0] or q.shape[2] != k.shape[2]:
        raise ProgramError(f"q is {q} and k {k}: tokens or head sizes differ")
    check_rows(q, tensor(types, 3, 2, "cos"), tensor(types, 4, 2, "sin"), attrs)
    return (q,)


def _rope_kv_write_meaning(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    layer: int,
    cache: int | None,
    group: str,
    style: str,
    rotary_dim: int,
    state: PagedState,
) -> torch.Tensor:
    turned = rope_meaning(k, cos, sin, style=style, rotary_dim=rotary_dim)
    state.write(group, _key(layer, cache), turned, v)
    return rope_meaning(q, cos, sin, style=style, rotary_dim=rotary_dim)


def _rope_kv_write_cost(
    types: Types, outs: Outputs, attrs: Attrs, bindings: Mapping[str, int]
) -> Cost:
    """q and k turned; k and v themselves go to the pages (see `_write_cost`)."""
    q, k, v = (tensor(types, i) for i in range(3))
    angles = types[3:]
    both = rope_cost((q, *angles), (q,), attrs, bindings)
    turned = rope_cost((k, *angles), (), attrs, bindings)
    read = turned.bytes_read + v.num_bytes(bindings)
    return both + Cost(read, 0, turned.flops)


def _value_head_dim(types: Types, attrs: dict[str, Attr]) -> dict[str, Attr]:
    attrs = _own_cache(types, attrs)
    if attrs["value_head_dim"] is not None:
        return attrs
    head = tensor(types, 0, 3, "q").shape[2]
    return attrs | {"value_head_dim": head if isinstance(head, int) else None}


def _paged_attention(types: Types, attrs: Attrs) -> Outputs:
    q = need_float(tensor(types, 0, 3, "q"), "q")
    check_sinks(types, 1, q)
    check_limits(attrs)
    return (TensorType(q.dtype, (*q.shape[:2], int_attr(attrs, "value_head_dim"))),)


def _paged_attention_meaning(
    q: torch.Tensor,
    sinks: torch.Tensor | None = None,
    *,
    layer: int,
    cache: int | None,
    group: str,
    value_head_dim: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    state: PagedState,
) -> torch.Tensor:
    import torch

    rows = []
    starts = state.query_starts.tolist()
    for sequence, (first, last) in enumerate(pairwise(starts)):
        queries = state.positions[first:last]
        start = 0
        if window is not None and len(queries):
            # Blocks that have left every query's window may be freed: never read them.
            start = max(0, int(queries.min()) - window + 1)
        keys, values = state.read(group, _key(layer, cache), sequence, start)
        places = torch.arange(start, start + keys.shape[0])
        visible = visible_mask(queries, places, window)
        rows.append(attend(q[first:last], keys, values, sinks, visible, scale, softcap))
    return torch.cat(rows) if rows else q.new_zeros(0, q.shape[1], value_head_dim)


def _write_cost(
    types: Types, outs: Outputs, attrs: Attrs, bindings: Mapping[str, int], load: PagedLoad
) -> Cost:
    """One position of keys and values is stored for each token."""
    tokens = evaluate_dim(tensor(types, 0).shape[0], bindings)
    return Cost(0, tokens * load.token_bytes, 0)


def _attend_cost(
    types: Types, outs: Outputs, attrs: Attrs, bindings: Mapping[str, int], load: PagedLoad
) -> Cost:
    """Every stored position that a sequence's queries can see is read once, whatever their number.

    The products are those of `attention`, over the pairs of query and key that see each other.
    """
    q = tensor(types, 0)
    window = attrs["window"]
    share, more = divmod(evaluate_dim(q.shape[0], bindings), load.sequences)
    read = pairs = 0
    for sequences, queries in ((load.sequences - more, share), (more, share + 1)):
        if sequences == 0 or queries == 0:
            continue
        context = max(load.context, queries)
        seen = min(context, window + queries - 1) if isinstance(window, int) else context
        read += sequences * seen
        pairs += sequences * visible_pairs(queries, context, window)
    return Cost(read * load.token_bytes, 0, pairs * pair_flops(q, outs[0]))


_PLACE = (
    AttrSpec("layer", AttrKind.INT),
    AttrSpec("cache", AttrKind.INT, None, optional=True),
    AttrSpec("group", AttrKind.STR),
)

OPS = (
    Op(
        "kv_write",
        Kind.STATE,
        "Stores k[T, G, D] and v[T, G, Dv] of the step's tokens in the layer's cache.",
        ("k", "v"),
        _kv_write,
        _kv_write_meaning,
        _PLACE,
        canonical=_own_cache,
        effects=True,
        stores=True,
        paged_cost=_write_cost,
        phases=AFTER_LOWERING,
    ),
    Op(
        "rope_kv_write",
        Kind.STATE,
        "`rope` of q and k, then `kv_write` of the rotated k and v; returns the rotated q.",
        ("q", "k", "v", "cos", "sin"),
        _rope_kv_write,
        _rope_kv_write_meaning,
        (*_PLACE, *ROPE_ATTRS),
        cost_rule=_rope_kv_write_cost,
        canonical=_own_cache,
        effects=True,
        stores=True,
        paged_cost=_write_cost,
        phases=AFTER_LOWERING,
    ),
    Op(
        "paged_attention",
        Kind.STATE,
        "`attention` of q[T, H, D] to what `cache` (by default, the layer's own) stores of each "
        "sequence, this step included -> [T, H, value_head_dim] (by default, the head size of q).",
        ("q", "sinks?"),
        _paged_attention,
        _paged_attention_meaning,
        (*_PLACE, AttrSpec("value_head_dim", AttrKind.INT, None, optional=True), *LIMITS),
        canonical=_value_head_dim,
        effects=True,
        mixer=True,
        paged_cost=_attend_cost,
        phases=AFTER_LOWERING,
    ),
)
