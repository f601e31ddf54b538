"""The metadata of a GGUF file as entries of a transformers `config.json`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ....ir.errors import CheckpointError, UnsupportedModelError
from .architectures import LAYER_NUMBER, Architecture
from .metadata import Metadata
from .ropes import rope_parameters
from .tensors import GgufTensors

_EMBEDDING: Final = "token_embd.weight"
_LAYER: Final = re.compile(rf"blk\.({LAYER_NUMBER})\.")
_MAX_LAYERS, _MAX_HEADS, _MAX_CONTEXT = 1 << 12, 1 << 12, 1 << 31
_IDS: Final = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the functions of single models read, and what is the same in all of them."""

    metadata: Metadata
    tensors: GgufTensors
    num_layers: int
    hidden_size: int
    num_heads: int
    head_dim: int
    context: int

    def has(self, name: str) -> bool:
        """Whether the first layer has a tensor."""
        return f"blk.0.{name}" in self.tensors.types

    def windows(self, period: int, *, full: int) -> list[str]:
        """Types of all layers: one in `period` sees all, the one at place `full`, others a window.

        A file may state another period, or the layers one by one.
        """
        key = ".attention.sliding_window_pattern"
        listed = None
        if isinstance(self.metadata.get(key), int):
            period = self.metadata.count(key)
            full = period - 1
        else:
            listed = self.metadata.numbers(key, self.num_layers)
        sliding = listed or [float(i % period != full) for i in range(self.num_layers)]
        return ["sliding_attention" if one else "full_attention" for one in sliding]


def config_entries(
    architecture: Architecture, metadata: Metadata, tensors: GgufTensors
) -> dict[str, Any]:
    """The configuration of a model, every size of it stated: defaults are those of one model.

    Raises CheckpointError, naming the key, for what is missing, absurd or contradicts the tensors,
    UnsupportedModelError for what has no counterpart.
    """
    facts = _facts(metadata, tensors)
    kv_heads = metadata.optional_count(".attention.head_count_kv", high=_MAX_HEADS)
    vocabulary = tensors.types[_EMBEDDING].shape[0]
    entries = {
        "model_type": architecture.model_type,
        "num_hidden_layers": facts.num_layers,
        "hidden_size": facts.hidden_size,
        "intermediate_size": metadata.count(".feed_forward_length"),
        "num_attention_heads": facts.num_heads,
        "num_key_value_heads": kv_heads or facts.num_heads,
        "head_dim": facts.head_dim,
        "max_position_embeddings": facts.context,
        "rms_norm_eps": metadata.number(".attention.layer_norm_rms_epsilon", zero=True),
        "vocab_size": vocabulary,
        "rope_parameters": _rope(facts),
        # Written only where it is not the embedding.
        "tie_word_embeddings": "output.weight" not in tensors.types,
        **_special_ids(metadata, int(str(vocabulary))),
    }
    return {**entries, **_MODELS.get(architecture.model_type, _nothing)(facts)}


def _facts(metadata: Metadata, tensors: GgufTensors) -> _Facts:
    num_layers = metadata.count(".block_count", high=_MAX_LAYERS)
    layers = map(_LAYER.match, tensors.types)
    numbers = {int(layer[1]) for layer in layers if layer is not None}
    if len(numbers) != num_layers or max(numbers, default=-1) != num_layers - 1:
        raise metadata.error(
            ".block_count", f"is {num_layers}, but there are {len(numbers)} blocks"
        )
    embedding = tensors.types.get(_EMBEDDING)
    if embedding is None:
        raise CheckpointError("is missing", where=f"{tensors.path}: tensor {_EMBEDDING}")
    hidden = metadata.count(".embedding_length", high=1 << 18)
    if embedding.rank != 2 or embedding.shape[1] != hidden:
        raise metadata.error(
            ".embedding_length", f"is {hidden}, but {_EMBEDDING} is {list(embedding.shape)}"
        )
    heads = metadata.count(".attention.head_count", high=_MAX_HEADS)
    size = metadata.optional_count(".attention.key_length", high=1 << 14)
    values = metadata.optional_count(".attention.value_length", high=1 << 14)
    if size is None and hidden % heads:
        raise metadata.error(
            ".embedding_length", f"is {hidden}, no multiple of {heads} heads, and no key_length"
        )
    size = size or hidden // heads
    if values not in (None, size):
        raise UnsupportedModelError(
            f"is {values} and key_length is {size}, which is not supported",
            where=f"{metadata.path}: {metadata.key('.attention.value_length')}",
        )
    context = metadata.count(".context_length", high=_MAX_CONTEXT)
    return _Facts(metadata, tensors, num_layers, hidden, heads, size, context)


def _special_ids(metadata: Metadata, vocabulary: int) -> dict[str, int | None]:
    """Of the ids that a file names, those that its model has."""
    keys = {name: f"tokenizer.ggml.{key}_token_id" for key, name in _IDS.items()}
    found = {name: metadata.optional_count(key, low=0, high=1 << 32) for name, key in keys.items()}
    return {name: one if one is None or one < vocabulary else None for name, one in found.items()}


def _rope(facts: _Facts) -> dict[str, Any]:
    metadata, size = facts.metadata, facts.head_dim
    turned = metadata.optional_count(".rope.dimension_count") or size
    if turned > size or turned % 2:
        raise metadata.error(".rope.dimension_count", f"is {turned}, and a head has {size} numbers")
    if any(metadata.numbers(".rope.dimension_sections", 4) or ()):
        raise UnsupportedModelError(
            "a rope of several axes is not supported",
            where=f"{metadata.path}: {metadata.key('.rope.dimension_sections')}",
        )
    found = rope_parameters(metadata, facts.tensors, facts.context, turned // 2)
    return found if turned == size else {**found, "partial_rotary_factor": turned / size}


def _whole_heads(facts: _Facts) -> None:
    """Refuses a rope of a part of each head, where the model has no such thing."""
    turned = facts.metadata.optional_count(".rope.dimension_count") or facts.head_dim
    if turned != facts.head_dim:
        raise facts.metadata.error(
            ".rope.dimension_count", f"is {turned}, and the size of a head {facts.head_dim}"
        )


def _nothing(facts: _Facts) -> dict[str, Any]:
    _whole_heads(facts)
    return {}


def _biases(facts: _Facts) -> dict[str, Any]:
    _whole_heads(facts)
    return {
        "attention_bias": facts.has("attn_q.bias"),
        "mlp_bias": facts.has("ffn_gate.bias"),
    }


def _mistral(facts: _Facts) -> dict[str, Any]:
    _whole_heads(facts)
    return {"sliding_window": facts.metadata.count(".attention.sliding_window")}


def _mixtral(facts: _Facts) -> dict[str, Any]:
    _whole_heads(facts)
    return {
        "num_local_experts": facts.metadata.count(".expert_count", high=1 << 14),
        "num_experts_per_tok": facts.metadata.count(".expert_used_count", high=1 << 14),
        "sliding_window": facts.metadata.optional_count(".attention.sliding_window", low=0) or None,
    }


def _qwen3(facts: _Facts) -> dict[str, Any]:
    _whole_heads(facts)
    return {"attention_bias": facts.has("attn_q.bias"), "use_sliding_window": False}


def _expert_width(facts: _Facts, key: str, tensor: str, dim: int) -> int:
    """A width that older files do not state, and a tensor of theirs shows."""
    stated = facts.metadata.optional_count(key)
    kind = facts.tensors.types.get(f"blk.0.{tensor}.weight")
    if stated is not None or kind is None or kind.rank <= dim:
        return stated or facts.metadata.count(key)
    return int(str(kind.shape[dim]))


def _qwen_experts(facts: _Facts) -> dict[str, Any]:
    return {
        **_qwen3(facts),
        "num_experts": facts.metadata.count(".expert_count", high=1 << 14),
        "num_experts_per_tok": facts.metadata.count(".expert_used_count", high=1 << 14),
        "moe_intermediate_size": _expert_width(
            facts, ".expert_feed_forward_length", "ffn_gate_exps", 1
        ),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen2_moe(facts: _Facts) -> dict[str, Any]:
    return {
        **_qwen_experts(facts),
        "norm_topk_prob": False,
        "qkv_bias": facts.has("attn_q.bias"),
        "shared_expert_intermediate_size": _expert_width(
            facts, ".expert_shared_feed_forward_length", "ffn_gate_shexp", 0
        ),
    }


def _qwen3_moe(facts: _Facts) -> dict[str, Any]:
    return {**_qwen_experts(facts), "norm_topk_prob": True}


def _query_scale(facts: _Facts, layers_of_27b: int) -> float:
    """Gemma divides scores by the root of the head size, and of another number in one size."""
    if facts.num_layers == layers_of_27b:
        return facts.hidden_size // facts.num_heads
    return facts.head_dim


def _soft_cap(facts: _Facts, key: str, default: float | None) -> float | None:
    return facts.metadata.number(key, default or 0.0, zero=True) or None


def _gemma2(facts: _Facts) -> dict[str, Any]:
    _whole_heads(facts)
    return {
        "sliding_window": facts.metadata.optional_count(".attention.sliding_window") or 4096,
        "layer_types": facts.windows(2, full=1),
        "query_pre_attn_scalar": _query_scale(facts, layers_of_27b=46),
        "attn_logit_softcapping": _soft_cap(facts, ".attn_logit_softcapping", 50.0),
        "final_logit_softcapping": _soft_cap(facts, ".final_logit_softcapping", 30.0),
    }


def _gemma3(facts: _Facts) -> dict[str, Any]:
    _whole_heads(facts)
    window = facts.metadata.optional_count(".attention.sliding_window", low=0)
    types = facts.windows(6, full=5) if window else ["full_attention"] * facts.num_layers
    local = facts.metadata.number(".rope.freq_base_swa", 10000.0)
    return {
        "sliding_window": window or facts.context,
        "layer_types": types,
        "query_pre_attn_scalar": _query_scale(facts, layers_of_27b=62),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": _soft_cap(facts, ".final_logit_softcapping", None),
        "rope_parameters": {
            "full_attention": _rope(facts),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _phi3(facts: _Facts) -> dict[str, Any]:
    found: dict[str, Any] = {
        "sliding_window": facts.metadata.optional_count(".attention.sliding_window", low=0) or None
    }
    rope = _rope(facts)
    if "original_max_position_embeddings" in rope:
        found["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    if "partial_rotary_factor" in rope:
        found["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return found


def _olmo2(facts: _Facts) -> dict[str, Any]:
    if facts.metadata.optional_count(".attention.sliding_window", low=0):
        raise UnsupportedModelError(
            "OLMo 3, which has windows, is not supported in GGUF files",
            where=f"{facts.metadata.path}: {facts.metadata.key('.attention.sliding_window')}",
        )
    _whole_heads(facts)
    return {"attention_bias": facts.has("attn_q.bias")}


def _granite(facts: _Facts) -> dict[str, Any]:
    metadata = facts.metadata
    if not metadata.flag(".rope.scaling.finetuned", True):
        raise UnsupportedModelError(
            "granite without rope is not supported",
            where=f"{metadata.path}: {metadata.key('.rope.scaling.finetuned')}",
        )
    return {
        **_biases(facts),
        "logits_scaling": metadata.number(".logit_scale"),
        "residual_multiplier": metadata.number(".residual_scale", 1.0),
        "embedding_multiplier": metadata.number(".embedding_scale", 1.0),
        "attention_multiplier": metadata.number(".attention.scale", facts.head_dim**-0.5),
    }


def _smollm3(facts: _Facts) -> dict[str, Any]:
    return {**_biases(facts), "no_rope_layer_interval": 4, "use_sliding_window": False}


def _glm4(facts: _Facts) -> dict[str, Any]:
    rope = _rope(facts)
    # Transformers would turn half of each head where nothing is said.
    return {
        "attention_bias": facts.has("attn_q.bias"),
        "rope_parameters": {"partial_rotary_factor": 1.0, **rope},
    }


def _gpt_oss(facts: _Facts) -> dict[str, Any]:
    _whole_heads(facts)
    rope = _rope(facts)
    if rope["rope_type"] == "yarn":
        rope["truncate"] = False  # of this model alone; no key says it
    return {
        "intermediate_size": _expert_width(
            facts, ".expert_feed_forward_length", "ffn_gate_exps", 1
        ),
        "num_local_experts": facts.metadata.count(".expert_count", high=1 << 14),
        "num_experts_per_tok": facts.metadata.count(".expert_used_count", high=1 << 14),
        "sliding_window": facts.metadata.count(".attention.sliding_window"),
        "layer_types": facts.windows(2, full=1),
        "attention_bias": facts.has("attn_q.bias"),
        "rope_parameters": rope,
    }


_MODELS: Final[Mapping[str, Callable[[_Facts], dict[str, Any]]]] = {
    "llama": _biases,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": lambda facts: {**_nothing(facts), "use_sliding_window": False},
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "granite": _granite,
    "smollm3": _smollm3,
    "glm4": _glm4,
    "gpt_oss": _gpt_oss,
}
