"""What the attention and mask hooks read, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import masking_utils as masks

from infc.frontend.hooks import CausalMask, attention_hook, mask_hook
from infc.ir.errors import UnsupportedModelError


class Attention(torch.nn.Module):
    layer_idx: int | None = 3
    is_causal = True


def call(module: Attention | None = None, **changes: Any) -> torch.Tensor:
    """The hook on q `[1, 4, 5, 8]`, k `[1, 2, 5, 8]` and v `[1, 2, 5, 6]`."""
    with FakeTensorMode():
        arguments: dict[str, Any] = {
            "query": torch.zeros(1, 4, 5, 8),
            "key": torch.zeros(1, 2, 5, 8),
            "value": torch.zeros(1, 2, 5, 6),
            "attention_mask": CausalMask(None),
            "scaling": 0.5,
        }
        out, weights = attention_hook(module or Attention(), **{**arguments, **changes})
        assert weights is None
        return out


def test_result_is_token_major_with_the_values_head_size() -> None:
    assert call().shape == (1, 5, 4, 6)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no mask": ({"attention_mask": None}, "mask"),
    "a mask of its own": (
        {"attention_mask": torch.zeros(1, 1, 5, 5)},
        "the model creates its own mask",
    ),
    "dropout": ({"dropout": 0.1}, "dropout"),
    "not causal": ({"is_causal": False}, "not causal"),
    "head mask": ({"head_mask": torch.ones(4)}, "head_mask"),
    "another window": (
        {"sliding_window": 7, "attention_mask": CausalMask(8)},
        "window 7, its mask 8",
    ),
    "unknown": ({"position_bias": torch.ones(4)}, "position_bias"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_op_cannot_say_is_refused(name: str) -> None:
    changes, reason = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=f"layer 3: .*{reason}"):
        call(**changes)


def test_a_module_must_say_its_layer_and_be_causal() -> None:
    module = Attention()
    module.layer_idx = None
    with pytest.raises(UnsupportedModelError, match="no layer index"):
        call(module)
    module = Attention()
    module.is_causal = False
    with pytest.raises(UnsupportedModelError, match="not causal"):
        call(module)


@given(st.integers(1, 1 << 20))
def test_window_of_a_mask(window: int) -> None:
    function = masks.sliding_window_causal_mask_function(window)
    assert mask_hook(mask_function=function) == CausalMask(window)
    packed = masks.packed_sequence_compatibility_function(
        function, torch.arange(4)[None], torch.zeros(1, 4)
    )
    assert mask_hook(mask_function=packed) == CausalMask(window)


def test_plain_causal_mask() -> None:
    assert mask_hook(mask_function=masks.causal_mask_function) == CausalMask(None)


def _bidirectional(*_: object) -> bool:
    return True


OTHER_MASKS = {
    "chunks": masks.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64)),
    "both ways": masks.bidirectional_mask_function,
    "both ways in a window": masks.sliding_window_bidirectional_mask_function(4),
    "blocks": masks.or_masks(
        masks.causal_mask_function, masks.blockwise_overlay(torch.zeros(1, 4))
    ),
    "window alone": masks.sliding_window_overlay(4),
    "a user's": masks.and_masks(masks.causal_mask_function, _bidirectional),
}


@pytest.mark.parametrize("name", OTHER_MASKS)
def test_other_masks_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="mask"):
        mask_hook(mask_function=OTHER_MASKS[name])


def test_padding_mask_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="padding"):
        mask_hook(mask_function=masks.causal_mask_function, attention_mask=torch.ones(1, 4))
