"""Models that call torch's own attention function: while they are traced, it is our op."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from ..ir.errors import UnsupportedModelError
from .hooks import CausalMask, attention_op, mask_hook, refuse
from .layers import traced_layer

SDPA_NAME = "sdpa"


@dataclass(frozen=True, slots=True)
class _SeenMask(CausalMask):
    """A mask that torch hands its functions over to, for it passes as a tensor."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        raise refuse(traced_layer(), f"the attention mask is used by {name}")


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: object = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """As torch's: q `[1, heads, T, head_dim]`, one KV head for all or as many as heads."""
    layer = traced_layer()
    if layer is None:
        raise UnsupportedModelError("attention is computed outside of the decoder layers")
    if dropout_p:
        raise refuse(layer, f"attention has dropout {dropout_p}")
    if is_causal:
        raise refuse(layer, "attention has two masks")
    heads, groups = query.shape[1], key.shape[1]
    if not enable_gqa and groups not in (1, heads):
        raise refuse(layer, f"attention pairs {heads} heads with {groups}")
    return attention_op(layer, query, key, value, attn_mask, scale).transpose(1, 2)


def _seen_mask(**kwargs: Any) -> CausalMask:
    return _SeenMask(mask_hook(**kwargs).window)


@contextmanager
def see_attention() -> Iterator[None]:
    """Within, attention by torch's own function is our op, for masks that the library makes.

    The library makes tensors of masks for this implementation: for as long as the model is
    traced they are values that say what they mask.
    """
    ALL_MASK_ATTENTION_FUNCTIONS[SDPA_NAME] = _seen_mask
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS[SDPA_NAME]
