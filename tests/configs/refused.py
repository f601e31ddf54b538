"""Models that infc refuses."""

from __future__ import annotations

from .base import COMMON, GPT, VOCAB_SIZE, Refused

REFUSED: dict[str, Refused] = {
    "lfm2": Refused(
        "lfm2",
        {**COMMON, "layer_types": ["conv", "full_attention"] * 2},
        "layer 0 of lfm2 is of type conv",
    ),
    "mamba": Refused(
        "mamba",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
        "mamba has no attention heads",
    ),
    "bloom": Refused(
        "bloom",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        "bloom does not use the attention interface of transformers",
    ),
    "falcon-alibi": Refused(
        "falcon",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_attention_heads": 4, "alibi": True},
        "falcon uses alibi, which is not supported",
    ),
    "mpt": Refused(
        "mpt",
        {"vocab_size": VOCAB_SIZE, "d_model": 64, "n_layers": 2, "n_heads": 4},
        "mpt does not use the attention interface of transformers",
    ),
    "gptj": Refused(
        "gptj",
        {**GPT, "rotary_dim": 16},
        "gptj does not use the attention interface of transformers",
    ),
    "gpt_neo": Refused(
        "gpt_neo",
        {
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
        },
        "gpt_neo does not use the attention interface of transformers",
    ),
    "rwkv": Refused(
        "rwkv",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2},
        "rwkv does not use the attention interface of transformers",
    ),
    "recurrent_gemma": Refused(
        "recurrent_gemma",
        {**COMMON, "num_hidden_layers": 3, "lru_width": 64},
        "layer 0 of recurrent_gemma is of type linear_attention",
    ),
    "jetmoe": Refused(
        "jetmoe",
        {**COMMON, "kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        "sort.default: this operation is not supported",
    ),
    "minimax": Refused(
        "minimax",
        {**COMMON, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
        "layer 1 of minimax is of type linear_attention",
    ),
    "longcat_flash": Refused(
        "longcat_flash",
        {
            **{key: COMMON[key] for key in ("vocab_size", "hidden_size", "num_attention_heads")},
            "num_layers": 2,
            "ffn_hidden_size": 96,
            "expert_ffn_hidden_size": 48,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
        },
        "longcat_flash cannot be exported",
    ),
    "codegen": Refused(
        "codegen",
        {**GPT, "rotary_dim": 16},
        "codegen does not use the attention interface of transformers",
    ),
}
