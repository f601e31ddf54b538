"""Small GGUF files of random models, written as llama.cpp's converter writes them.

Names of tensors are those that the gguf package gives to the parameters of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import torch
from tokenizers import pre_tokenizers

from .checkpoints import CHAT_TEMPLATE, make_model
from .configs.base import BOS_ID, EOS_ID, ORIGINAL_CONTEXT, VOCAB_SIZE, rope

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "granite": "granite",
    "smollm3": "smollm3",
    "glm4": "glm4",
    "gpt_oss": "gpt-oss",
}
"""Model types of transformers, and what GGUF files call them."""

_LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": ORIGINAL_CONTEXT}
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama-tied": ("llama-tied", {}),
    "llama-linear": ("llama-linear", {}),
    "llama-yarn": ("llama-yarn", {}),
    "llama-llama3": ("llama", rope("llama3", **_LLAMA3)),
    "mistral": ("mistral", {}),
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2_moe": ("qwen2_moe", {"decoder_sparse_step": 1, "norm_topk_prob": False}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 16, "tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 16, "tie_word_embeddings": True}),
    "phi3": ("phi3", {}),
    "phi3-longrope": ("phi3-longrope", {}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 4}),
    "glm4": ("glm4", {}),
    "gpt_oss": ("gpt_oss", {"swiglu_limit": 7.0}),
}
"""Files by name: the small model in `tests/configs`, and what differs from it.

What is set here is what a GGUF file cannot state, as every model of its kind has it.
"""


Stored = Callable[[str], gguf.GGMLQuantizationType | None]
"""Gives the format that a matrix of that name is stored in; None for float32."""


def make_gguf(
    name: str,
    path: Path,
    *,
    tokenizer: bool = False,
    stored: Stored = lambda _: None,
    **overrides: Any,
) -> Any:
    """Writes the file of that name, and returns the model in it.

    Tensors are in float32, but matrices of whole blocks in the format that `stored` says.
    """
    arch, settings = FILES[name]
    layers = {} if name in ("smollm3", "gemma3") else {"num_hidden_layers": 2}
    model = make_model(arch, **{**layers, **settings, **overrides})
    writer = gguf.GGUFWriter(path, ARCHITECTURES[model.config.model_type])
    write_metadata(writer, model.config)
    if tokenizer:
        write_byte_tokenizer(writer)
    else:
        writer.add_tokenizer_model("none")
    for tensor, value in tensors_of(model):
        array, kind = value.detach().contiguous().numpy(), stored(tensor)
        if kind is None or array.ndim == 1 or array.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            writer.add_tensor(tensor, array)
        else:
            writer.add_tensor(tensor, gguf.quants.quantize(array, kind), raw_dtype=kind)
    finish(writer)
    return model


def finish(writer: gguf.GGUFWriter) -> None:
    """Writes what was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    """The configuration of a model under the keys of its architecture."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    _write_rope(writer, config, head_dim)
    _write_windows(writer, config)
    _write_experts(writer, config)
    if config.model_type == "granite":
        writer.add_logit_scale(config.logits_scaling)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
    if config.model_type == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _write_rope(writer: gguf.GGUFWriter, config: Any, head_dim: int) -> None:
    parameters = config.rope_parameters
    if "sliding_attention" in parameters:
        writer.add_rope_freq_base_swa(parameters["sliding_attention"]["rope_theta"])
        parameters = parameters["full_attention"]
    writer.add_rope_freq_base(parameters["rope_theta"])
    writer.add_rope_dimension_count(int(head_dim * parameters.get("partial_rotary_factor", 1.0)))
    kind = parameters["rope_type"]
    original = parameters.get("original_max_position_embeddings")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(parameters["factor"])
    if kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(original)
    if kind == "longrope":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        scale = config.max_position_embeddings / original
        factor = math.sqrt(1 + math.log(scale) / math.log(original))
        writer.add_rope_scaling_attn_factors(factor)


def _write_windows(writer: gguf.GGUFWriter, config: Any) -> None:
    window = getattr(config, "sliding_window", None)
    if window is not None and config.model_type not in ("qwen2", "qwen3", "qwen2_moe", "smollm3"):
        writer.add_sliding_window(window)
    if config.model_type == "gemma3_text":
        pattern = [kind == "sliding_attention" for kind in config.layer_types]
        writer.add_sliding_window_pattern(pattern)


def _write_experts(writer: gguf.GGUFWriter, config: Any) -> None:
    count = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if count is None:
        return
    writer.add_expert_count(count)
    writer.add_expert_used_count(config.num_experts_per_tok)
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    if config.model_type != "mixtral":
        writer.add_expert_feed_forward_length(width)
    if config.model_type == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def tensors_of(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """A model's parameters by their names in a GGUF file, in the layouts that llama.cpp reads."""
    config = model.config
    kind = next(
        kind
        for kind, name in gguf.MODEL_ARCH_NAMES.items()
        if name == ARCHITECTURES[config.model_type]
    )
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tied = bool(config.tie_word_embeddings)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        for published, tensor in _published(name, value, config):
            stem, _, suffix = published.rpartition(".")
            found = names.get_name(stem)
            assert found is not None, published
            yield f"{found}.{suffix}", _stored(stem, tensor, config)
    yield from _rope_factors(config)


def _published(name: str, value: torch.Tensor, config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Names that end in `.weight` or `.bias`, the parts of experts apart."""
    place, _, last = name.rpartition(".")
    if last == "sinks":
        yield f"{name}.weight", value
    elif not place.endswith(".experts"):
        if name.endswith("shared_expert_gate.weight"):
            value = value[0]
        yield name, value
    elif config.model_type == "gpt_oss":
        suffix = "bias" if last.endswith("_bias") else "weight"
        rows = value if suffix == "bias" else value.transpose(1, 2)
        if last.startswith("down"):
            yield f"{place}.down_proj.{suffix}", rows
        else:
            yield f"{place}.gate_proj.{suffix}", rows[:, ::2]
            yield f"{place}.up_proj.{suffix}", rows[:, 1::2]
    elif last == "down_proj":
        yield f"{place}.down_proj.weight", value
    else:
        gate, up = value.chunk(2, dim=1)
        yield f"{place}.gate_proj.weight", gate
        yield f"{place}.up_proj.weight", up


def _stored(stem: str, value: torch.Tensor, config: Any) -> torch.Tensor:
    kind = config.model_type
    if kind in ("llama", "mistral", "mixtral", "granite", "smollm3"):
        if stem.endswith("q_proj"):
            return _paired(value, config.num_attention_heads)
        if stem.endswith("k_proj"):
            return _paired(value, config.num_key_value_heads)
    if kind.startswith("gemma") and stem.endswith("norm"):
        return value + 1
    return value


def _paired(value: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of both halves of a head in turn."""
    rows = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return rows.swapaxes(1, 2).reshape(value.shape)


def _rope_factors(config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    parameters = config.rope_parameters
    kind = parameters.get("rope_type")
    if kind == "longrope":
        for length in ("long", "short"):
            yield f"rope_factors_{length}.weight", torch.tensor(parameters[f"{length}_factor"])
    if kind == "llama3":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        size = config.head_dim
        plain = parameters["rope_theta"] ** -(torch.arange(0, size, 2).float() / size)
        yield "rope_freqs.weight", plain / ROPE_INIT_FUNCTIONS["llama3"](config)[0]


def byte_alphabet() -> list[str]:
    """The characters that stand for bytes, as the tokenizer of `tests/checkpoints.py` has them."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def write_byte_tokenizer(writer: gguf.GGUFWriter, pre: str = "gpt-2") -> None:
    """The byte-level tokenizer of `tests/checkpoints.py`, with two merges and a chat template."""
    tokens = [*byte_alphabet(), "<s>", "</s>", "Ġt", "Ġth", "<|im_end|>", "<think>"]
    types = [1] * 256 + [3, 3, 1, 1, 3, 4]
    for number in range(len(tokens), VOCAB_SIZE):  # rows of the embedding that no token has
        tokens.append(f"[PAD{number}]")
        types.append(5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(["Ġ t", "Ġt h"])
    writer.add_bos_token_id(BOS_ID)
    writer.add_eos_token_id(EOS_ID)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)
