"""Attention by torch's own function: captured where it is causal, refused with its layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from infc.frontend.load import load_model
from infc.frontend.sdpa import see_attention
from infc.ir.errors import UnsupportedModelError

from ..checkpoints import make_checkpoint
from .oracle import no_log

ORIGINAL = functional.scaled_dot_product_attention


def test_one_kv_head_stays_one(tmp_path: Path) -> None:
    """Torch broadcasts it over the heads; the cache must not hold it four times."""
    make_checkpoint("falcon", tmp_path)
    program = load_model(tmp_path, log=no_log)
    assert (program.spec.num_heads, program.spec.num_kv_heads) == (4, 1)
    layers = [node.attrs["layer"] for node in program.nodes if node.op == "attention"]
    assert layers == [0, 1, 2, 3]


def test_the_library_makes_its_own_masks_afterwards() -> None:
    before = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    with see_attention():
        assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is not before
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is before


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dropout": ({"dropout_p": 0.5}, "has dropout 0.5"),
    "two masks": ({"is_causal": True}, "has two masks"),
    "no mask": ({"attn_mask": None, "is_causal": False}, "scaled_dot_product_attention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_op_cannot_say_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, reason = REFUSED[name]

    def changed(*args: Any, **kwargs: Any) -> Any:
        return ORIGINAL(*args, **{**kwargs, **changes})

    make_checkpoint("falcon", tmp_path)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", changed)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        load_model(tmp_path, log=no_log)
    assert "layer 0" in str(caught.value)


def test_a_mask_that_the_model_changes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(*args: Any, **kwargs: Any) -> Any:
        return ORIGINAL(*args, **{**kwargs, "attn_mask": torch.add(kwargs["attn_mask"], 1.0)})

    make_checkpoint("falcon", tmp_path)
    monkeypatch.setattr(functional, "scaled_dot_product_attention", changed)
    with pytest.raises(UnsupportedModelError, match="the attention mask is used by add"):
        load_model(tmp_path, log=no_log)
