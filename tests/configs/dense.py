"""Dense models that infc compiles."""

from __future__ import annotations

from typing import Any

import torch

from .base import (
    BOS_ID,
    COMMON,
    EOS_ID,
    GPT,
    MAX_CONTEXT,
    ORIGINAL_CONTEXT,
    VOCAB_SIZE,
    WINDOW,
    Config,
    Tensors,
    rope,
)

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


def _published_gpt_neox(tensors: Tensors, config: Any) -> dict[str, torch.Tensor]:
    """A causal mask, its fill value and the rope's frequencies in each layer."""
    published = dict(tensors)
    size = config.max_position_embeddings
    for layer in range(config.num_hidden_layers):
        place = f"gpt_neox.layers.{layer}.attention"
        mask = torch.tril(torch.ones(size, size, dtype=torch.bool)).view(1, 1, size, size)
        published[f"{place}.bias"] = mask
        published[f"{place}.masked_bias"] = torch.tensor(-1e9)
        published[f"{place}.rotary_emb.inv_freq"] = torch.ones(2)
    return published


def _published_opt(tensors: Tensors, config: Any) -> dict[str, torch.Tensor]:
    """No `model.` in front."""
    return {name.removeprefix("model."): value for name, value in tensors.items()}


def _scaled_queries(tensors: Tensors, config: Any) -> dict[str, torch.Tensor]:
    """Scores have no scale of their own: that of a trained model lies in its norms of queries.

    Without it, attention of random weights picks single tokens, and a last bit grows from layer to
    layer. So it does where the embeddings of a layer's own outweigh what the layer computes.
    """
    small = ("q_norm.weight", "per_layer_input_norm.weight")
    return {name: x * 0.1 if name.endswith(small) else x for name, x in tensors.items()}


_OPT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_CONTEXT,
    "word_embed_proj_dim": 64,
    "dropout": 0.0,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": 1,
}
_FALCON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_CONTEXT,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}

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
    "gemma": Config("gemma", {**COMMON, "head_dim": 32}, "scaled embeddings, norms around zero"),
    "gemma3_text": Config(
        "gemma3_text",
        {
            **COMMON,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "a rope for windows and another for full attention",
    ),
    "gemma3-one-kv-head": Config(
        "gemma3_text",
        {
            **COMMON,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "one key-value head",
    ),
    "gemma4_text": Config(
        "gemma4_text",
        {
            **COMMON,
            "pad_token_id": 0,
            "num_hidden_layers": 6,
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 3,
            "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCAB_SIZE,
        },
        "the last layers read the caches of earlier ones; embeddings of each layer's own",
        _scaled_queries,
    ),
    "phi": Config(
        "phi",
        {**COMMON, "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0}},
        "parallel attention and feed-forward, half of each head turned, a bias in the head",
    ),
    "olmo": Config("olmo", {**COMMON, "clip_qkv": 1.5}, "norms without weights, clipped q, k, v"),
    "olmo2": Config("olmo2", COMMON, "norms behind the blocks; q and k normalised whole"),
    "granite": Config(
        "granite",
        {
            **COMMON,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.3,
            "attention_multiplier": 0.2,
        },
        "multipliers of embeddings, residuals, scores and logits",
    ),
    "cohere": Config(
        "cohere",
        {**COMMON, "use_qk_norm": True},
        "parallel blocks, rope of neighbours, norms of each head, scaled logits",
    ),
    "cohere2": Config(
        "cohere2",
        {
            **COMMON,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "windows with rope, full attention without",
    ),
    "starcoder2": Config(
        "starcoder2",
        {**COMMON, "sliding_window": WINDOW, "use_bias": True},
        "layer norms, biases everywhere, window",
    ),
    "stablelm": Config(
        "stablelm",
        {**COMMON, "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 10000.0}},
        "layer norms, a quarter of each head turned",
    ),
    "stablelm-parallel": Config(
        "stablelm",
        {**COMMON, "use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
        "parallel residual, a layer norm for each head of q and k",
    ),
    "gpt_neox": Config(
        "gpt_neox",
        {
            **{k: v for k, v in COMMON.items() if k != "num_key_value_heads"},
            "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 10000.0},
        },
        "fused q, k, v by head, parallel residual",
        _published_gpt_neox,
    ),
    "gpt_neox-sequential": Config(
        "gpt_neox",
        {
            **{k: v for k, v in COMMON.items() if k != "num_key_value_heads"},
            "use_parallel_residual": False,
        },
        "sequential residual",
    ),
    "opt": Config("opt", _OPT, "learned positions from 2 on, relu", _published_opt),
    "opt-post": Config(
        "opt",
        {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 32},
        "norms behind, projected embeddings",
    ),
    "falcon": Config("falcon", _FALCON, "one KV head, parallel blocks"),
    "falcon-new": Config(
        "falcon",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
        "several KV heads and two norms in parallel",
    ),
    "falcon-sequential": Config(
        "falcon",
        {**_FALCON, "parallel_attn": False, "multi_query": False, "bias": True},
        "as many KV heads as heads, sequential",
    ),
    "smollm3": Config(
        "smollm3",
        {**COMMON, "no_rope_layer_interval": 2},
        "every other layer without rope",
    ),
    "glm": Config(
        "glm",
        {
            **COMMON,
            "head_dim": 32,
            "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0},
        },
        "rope of neighbours in half of each head, fused gate/up",
    ),
    "glm4": Config(
        "glm4",
        {
            **COMMON,
            "head_dim": 32,
            "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0},
        },
        "four norms a layer",
    ),
    "exaone4": Config(
        "exaone4",
        {
            **COMMON,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "norms behind the blocks and of q and k; full attention without rope",
    ),
    "nemotron": Config(
        "nemotron",
        {**COMMON, "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0}},
        "layer norms around one, squared relu",
    ),
    "helium": Config("helium", {**COMMON, "head_dim": 16}, "rope of neighbours"),
    "ernie4_5": Config("ernie4_5", {**COMMON, "head_dim": 32}, "rope of neighbours"),
    "seed_oss": Config(
        "seed_oss",
        {**COMMON, "head_dim": 32, "attention_dropout": 0.0, "residual_dropout": 0.0},
        "biases in q, k, v",
    ),
    "bitnet": Config("bitnet", COMMON, "norms inside attention and feed-forward, squared relu"),
    "arcee": Config("arcee", COMMON, "squared relu without a gate"),
    "apertus": Config("apertus", COMMON, "xIELU, normalised q and k"),
    "hunyuan_v1_dense": Config(
        "hunyuan_v1_dense", {**COMMON, "head_dim": 32}, "q and k normalised behind the rope"
    ),
    "persimmon": Config(
        "persimmon",
        {
            **{k: v for k, v in COMMON.items() if k != "num_key_value_heads"},
            "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 10000.0},
        },
        "fused q, k, v by head, layer norms of each head, squared relu",
    ),
}
