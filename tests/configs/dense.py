"""Dense models that infc compiles."""

from __future__ import annotations

from typing import Any

import torch

from .base import COMMON, GPT, MAX_CONTEXT, ORIGINAL_CONTEXT, WINDOW, Config, Tensors, rope

_LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL_CONTEXT,
}
_YARN = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL_CONTEXT}


def _longrope(original: int, longest: int) -> dict[str, Any]:
    """Frequencies that change where more than `original` tokens are wanted."""
    factors = {
        "long_factor": [1.0 + 0.5 * i for i in range(8)],
        "short_factor": [1.0 + 0.1 * i for i in range(8)],
        "original_max_position_embeddings": original,
    }
    return {
        "max_position_embeddings": longest,
        "original_max_position_embeddings": original,
        **rope("longrope", **factors),
    }


def _published_gpt2(tensors: Tensors, config: Any) -> dict[str, torch.Tensor]:
    """No `transformer.` in front, and a causal mask in each layer."""
    published = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    size = config.n_positions
    for layer in range(config.n_layer):
        mask = torch.tril(torch.ones(size, size)).view(1, 1, size, size)
        published[f"h.{layer}.attn.bias"] = mask
    return published


DENSE: dict[str, Config] = {
    "llama": Config("llama", COMMON),
    "llama-tied": Config("llama", {**COMMON, "tie_word_embeddings": True}, "tied embeddings"),
    "llama-linear": Config("llama", {**COMMON, **rope("linear", factor=4.0)}, "rope linear"),
    "llama-yarn": Config("llama", {**COMMON, **rope("yarn", **_YARN)}, "rope yarn"),
    "llama-llama3": Config("llama", {**COMMON, **rope("llama3", **_LLAMA3)}, "rope llama3"),
    "llama-dynamic": Config(
        "llama", {**COMMON, **rope("dynamic", factor=4.0)}, "rope dynamic, within the length"
    ),
    "qwen2": Config("qwen2", COMMON, "biases in q, k, v"),
    "qwen3": Config(
        "qwen3", {**COMMON, "head_dim": 32}, "normalised q and k, head size apart from the hidden"
    ),
    "mistral": Config("mistral", {**COMMON, "sliding_window": WINDOW}, "sliding window"),
    "gemma2": Config(
        "gemma2",
        {**COMMON, "head_dim": 16, "sliding_window": WINDOW},
        "soft-capped scores and logits, window and full attention in turn",
    ),
    "gpt2": Config("gpt2", GPT, "learned positions, layer norm", _published_gpt2),
    "phi3": Config("phi3", COMMON, "fused QKV and gate/up"),
    "phi3-longrope": Config(
        "phi3",
        {**COMMON, **_longrope(ORIGINAL_CONTEXT, MAX_CONTEXT)},
        "longrope, long factors",
        min_tokens=ORIGINAL_CONTEXT + 1,
    ),
    "phi3-longrope-short": Config(
        "phi3", {**COMMON, **_longrope(MAX_CONTEXT, 256)}, "longrope, short factors"
    ),
}
