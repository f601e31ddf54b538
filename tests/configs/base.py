"""What describes a small model of one architecture, and the sizes that most of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

VOCAB_SIZE = 320
BOS_ID, EOS_ID = 256, 257
WINDOW = 8
ORIGINAL_CONTEXT = 16
MAX_CONTEXT = 128

Tensors = Mapping[str, torch.Tensor]
Publish = Callable[[Tensors, Any], dict[str, torch.Tensor]]
"""Tensors as transformers saves them, and the configuration -> as the model was published."""


@dataclass(frozen=True, slots=True)
class Config:
    """A small model that infc compiles.

    `kind` is transformers' model type; `shows` says what is special, for the table in the docs;
    `publish` renames tensors where published files differ from what transformers saves today.
    `max_context` is what to compile for, where that chooses between ropes; transformers chooses
    alike for prompts of at least `min_tokens`.
    """

    kind: str
    settings: Mapping[str, Any]
    shows: str = ""
    publish: Publish | None = None
    max_context: int = MAX_CONTEXT
    min_tokens: int = 1


@dataclass(frozen=True, slots=True)
class Refused:
    """A small model that infc refuses, and the words that it does so with."""

    kind: str
    settings: Mapping[str, Any]
    reason: str


COMMON: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_CONTEXT,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": None,
}
GPT: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": MAX_CONTEXT,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}


def rope(kind: str, **more: Any) -> dict[str, Any]:
    """Rotary embedding of one kind."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}
