"""Which transformers model a GGUF architecture is: its tensors by name, and how they are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from ....ir.errors import UnsupportedModelError
from ....ir.nearest import did_you_mean
from .metadata import Metadata

TOP: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
"""Tensors of no layer, without `.weight`."""

LAYER_NUMBER: Final = "0|[1-9][0-9]{0,4}"
"""The numbers of layers in names of tensors, as a pattern."""

_ATTENTION: Final = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORMS: Final = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_NORMS: Final = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_GATED: Final = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_FUSED: Final = {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"}
_GEMMA_NORMS: Final = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_ROUTED: Final = {"ffn_gate_inp": "mlp.gate"}
_SHARED: Final = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_DENSE: Final = {**_ATTENTION, **_NORMS, **_GATED}


@dataclass(frozen=True, slots=True)
class Architecture:
    """How files of one architecture store a model of transformers.

    `layer` are the tensors of a layer without number and suffix. `pairs`: rows of q and k stand
    in pairs, as a rope of neighbours reads them, and transformers has them in halves. `norm_shift`
    is what was added to every norm. `experts`: the parameters of routed experts are `split`
    (a gate and an up tensor), or `interleaved` in the model, which then multiplies from the left.
    """

    model_type: str
    layer: Mapping[str, str] = field(default_factory=lambda: _DENSE)
    pairs: bool = False
    norm_shift: float = 0.0
    experts: str | None = None


_LLAMA: Final = Architecture("llama", pairs=True)
_GEMMA: Final = {**_ATTENTION, **_GEMMA_NORMS, **_GATED}

ARCHITECTURES: Final[Mapping[str, Architecture]] = {
    "llama": _LLAMA,
    "qwen2": Architecture("qwen2"),
    "qwen2moe": Architecture(
        "qwen2_moe", {**_ATTENTION, **_NORMS, **_ROUTED, **_SHARED}, experts="split"
    ),
    "qwen3": Architecture("qwen3", {**_DENSE, **_QK_NORMS}),
    "qwen3moe": Architecture(
        "qwen3_moe", {**_ATTENTION, **_QK_NORMS, **_NORMS, **_ROUTED}, experts="split"
    ),
    "gemma": Architecture("gemma", norm_shift=1.0),
    "gemma2": Architecture("gemma2", _GEMMA, norm_shift=1.0),
    "gemma3": Architecture("gemma3_text", {**_GEMMA, **_QK_NORMS}, norm_shift=1.0),
    "phi3": Architecture(
        "phi3",
        {
            **_NORMS,
            **_FUSED,
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
        },
    ),
    "olmo2": Architecture(
        "olmo2",
        {
            **_ATTENTION,
            **_QK_NORMS,
            **_GATED,
            "post_attention_norm": "post_attention_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        },
    ),
    "granite": Architecture("granite", pairs=True),
    "smollm3": Architecture("smollm3", pairs=True),
    "glm4": Architecture(
        "glm4",
        {
            **_ATTENTION,
            **_NORMS,
            **_FUSED,
            "post_attention_norm": "post_self_attn_layernorm",
            "post_ffw_norm": "post_mlp_layernorm",
        },
    ),
    "gpt-oss": Architecture(
        "gpt_oss",
        {
            **_ATTENTION,
            "attn_norm": "input_layernorm",
            "post_attention_norm": "post_attention_layernorm",
            "attn_sinks": "self_attn.sinks",
            "ffn_gate_inp": "mlp.router",
        },
        experts="interleaved",
    ),
}
_MIXTRAL: Final = Architecture(
    "mixtral", {**_ATTENTION, **_NORMS, **_ROUTED}, pairs=True, experts="split"
)
_MISTRAL: Final = Architecture("mistral", pairs=True)


def architecture_of(metadata: Metadata) -> Architecture:
    """The architecture that a file names.

    Raises UnsupportedModelError, naming it, for one that has no counterpart here.
    """
    name = metadata.text("general.architecture")
    if name not in ARCHITECTURES:
        near = did_you_mean(name, ARCHITECTURES)
        raise UnsupportedModelError(
            f"the architecture {name!r} is not supported in GGUF files",
            where=f"{metadata.path}: general.architecture",
            hint=f"supported: {', '.join(sorted(ARCHITECTURES))}" + (f"; {near}" if near else ""),
        )
    if name != "llama":
        return ARCHITECTURES[name]
    # One architecture in a file, three in transformers.
    if metadata.optional_count(".expert_count", low=0):
        return _MIXTRAL
    return _MISTRAL if metadata.optional_count(".attention.sliding_window", low=0) else _LLAMA
