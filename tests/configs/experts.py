"""Mixtures of experts that infc compiles."""

from __future__ import annotations

from typing import Any

from .base import COMMON, MAX_CONTEXT, ORIGINAL_CONTEXT, WINDOW, Config, rope

_FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
_QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
_GROUPS = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 48,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "num_hidden_layers": 6,
}
"""More layers: one that is dense, and enough equal ones that the others are not traced."""
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 20,
}
_PHI = {**_FOUR, "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.3}
_GRANITE = {
    "attention_multiplier": 0.0625,
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
}


_LONGROPE = rope(
    "longrope",
    long_factor=[1.0 + 0.5 * i for i in range(8)],
    short_factor=[1.0 + 0.1 * i for i in range(8)],
    short_mscale=1.1,
    long_mscale=1.3,
    original_max_position_embeddings=ORIGINAL_CONTEXT,
)


def _yarn(**more: Any) -> dict[str, Any]:
    return rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL_CONTEXT, **more)


EXPERTS: dict[str, Config] = {
    "mixtral": Config("mixtral", {**COMMON, **_FOUR}, "two of four experts a token"),
    "phimoe": Config("phimoe", {**COMMON, **_PHI}, "one expert after the other is chosen"),
    "phimoe-longrope": Config(
        "phimoe",
        {**COMMON, **_PHI, **_LONGROPE},
        "longrope, long scale (transformers leaves the factors short)",
        max_context=MAX_CONTEXT,
        min_tokens=ORIGINAL_CONTEXT + 1,
    ),
    "olmoe": Config(
        "olmoe", {**COMMON, "num_experts": 4, "num_experts_per_tok": 2}, "normalised q and k"
    ),
    "flex_olmo": Config("flex_olmo", {**COMMON, "num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": Config(
        "granitemoe", {**COMMON, **_FOUR, **_GRANITE}, "experts published as one tensor"
    ),
    "granitemoeshared": Config(
        "granitemoeshared",
        {**COMMON, **_FOUR, **_GRANITE, "shared_intermediate_size": 32},
        "a shared expert",
    ),
    "gpt_oss": Config(
        "gpt_oss",
        {
            **COMMON,
            **_FOUR,
            **_yarn(beta_fast=32.0, beta_slow=1.0, truncate=False),
            "head_dim": 16,
            "sliding_window": WINDOW,
            "swiglu_limit": 0.7,
        },
        "attention sinks, biases in experts, a limited gate, window and full attention in turn; "
        "bfloat16 files (MXFP4 is refused)",
    ),
    "qwen2_moe": Config(
        "qwen2_moe",
        {
            **COMMON,
            **_QWEN,
            "shared_expert_intermediate_size": 64,
            "decoder_sparse_step": 2,
            "num_hidden_layers": 8,
        },
        "a shared expert behind a gate, dense layers in between",
    ),
    "qwen3_moe": Config("qwen3_moe", {**COMMON, **_QWEN, "head_dim": 32, "norm_topk_prob": True}),
    "hunyuan_v1_moe": Config(
        "hunyuan_v1_moe", {**COMMON, "head_dim": 16, "num_experts": 4, "moe_topk": 2}
    ),
    "ernie4_5_moe": Config(
        "ernie4_5_moe",
        {
            **COMMON,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 48,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
        "weights and choice of experts by different scores",
    ),
    "minimax_m2": Config(
        "minimax_m2", {**COMMON, **_FOUR, "head_dim": 16}, "sigmoid scores with a correction"
    ),
    "deepseek_v2": Config(
        "deepseek_v2",
        {
            **COMMON,
            **_GROUPS,
            **_LATENT,
            "topk_method": "group_limited_greedy",
            **_yarn(mscale=0.7, mscale_all_dim=0.7),
        },
        "latent attention as captured, complex rotation, experts limited to groups",
    ),
    "deepseek_v2-greedy": Config(
        "deepseek_v2",
        {**COMMON, **_GROUPS, **_LATENT, "q_lora_rank": None, "topk_method": "greedy"},
        "plain q projection (Lite)",
    ),
    "deepseek_v3": Config(
        "deepseek_v3",
        {**COMMON, **_GROUPS, **_LATENT, **_yarn(mscale=1.0, mscale_all_dim=1.0)},
        "latent attention as captured, first layer dense, corrected scores, groups, yarn",
    ),
    "glm4_moe": Config(
        "glm4_moe",
        {**COMMON, **_GROUPS, "head_dim": 16, "use_qk_norm": True, "attention_bias": True},
        "a part of each head is rotated, corrected scores, groups",
    ),
    "glm4_moe_lite": Config("glm4_moe_lite", {**COMMON, **_GROUPS, **_LATENT}, "latent attention"),
    "dots1": Config("dots1", {**COMMON, **_GROUPS, "head_dim": 16}),
}
