"""Small random checkpoints under published names, with weights spread so that faults show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers.utils import logging

VOCAB_SIZE = 320
BOS_ID, EOS_ID = 256, 257
WINDOW = 8
ORIGINAL_CONTEXT = 16
MAX_CONTEXT = 128

_COMMON = {
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


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


_LLAMA3 = {
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL_CONTEXT,
}
_YARN = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL_CONTEXT}
_LONG = {
    "long_factor": [1.0 + 0.5 * i for i in range(8)],
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "original_max_position_embeddings": ORIGINAL_CONTEXT,
}
_GPT = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": MAX_CONTEXT,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}

_LONGROPE = {
    "original_max_position_embeddings": ORIGINAL_CONTEXT,
    **_rope("longrope", **_LONG),
}

# Name of the checkpoint -> (model type, its configuration).
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _COMMON),
    "llama-tied": ("llama", {**_COMMON, "tie_word_embeddings": True}),
    "llama-linear": ("llama", {**_COMMON, **_rope("linear", factor=4.0)}),
    "llama-yarn": ("llama", {**_COMMON, **_rope("yarn", **_YARN)}),
    "llama-llama3": ("llama", {**_COMMON, **_rope("llama3", **_LLAMA3)}),
    "llama-dynamic": ("llama", {**_COMMON, **_rope("dynamic", factor=4.0)}),
    "qwen2": ("qwen2", _COMMON),
    "qwen3": ("qwen3", {**_COMMON, "head_dim": 32}),
    "mistral": ("mistral", {**_COMMON, "sliding_window": WINDOW}),
    "gemma2": ("gemma2", {**_COMMON, "head_dim": 16, "sliding_window": WINDOW}),
    "gpt2": ("gpt2", _GPT),
    "phi3": ("phi3", _COMMON),
    "phi3-longrope": ("phi3", {**_COMMON, **_LONGROPE}),
    "mixtral": ("mixtral", {**_COMMON, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "lfm2": ("lfm2", {**_COMMON, "layer_types": ["conv", "full_attention"] * 2}),
    "mamba": (
        "mamba",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    ),
    "bloom": ("bloom", {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "codegen": ("codegen", {**_GPT, "rotary_dim": 16}),
}

PARITY = (
    "llama",
    "llama-tied",
    "llama-linear",
    "llama-yarn",
    "llama-llama3",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "gpt2",
    "phi3",
    "mixtral",
)
"""The checkpoints that infc compiles whatever `max_context` is."""

REFUSED = ("lfm2", "mamba", "bloom", "codegen")
"""The checkpoints that infc refuses with a reason."""


def make_checkpoint(
    arch: str,
    directory: Path | str,
    *,
    seed: int = 0,
    dtype: str = "float32",
    tokenizer: bool = False,
    shard_bytes: int | None = None,
    **overrides: Any,
) -> Path:
    """Writes a random checkpoint of `CONFIGS[arch]` and returns its directory.

    `overrides` replace entries of the configuration; `dtype` is that of the file; `shard_bytes`
    splits the weights into files of about that size. The same arguments give the same weights.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    model = make_model(arch, seed=seed, **overrides).to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    size = {} if shard_bytes is None else {"max_shard_size": shard_bytes}
    logging.disable_progress_bar()
    model.save_pretrained(target, **size)
    if model.config.model_type == "gpt2":
        _publish_as_gpt2(target, model.config)
    if tokenizer:
        write_tokenizer_files(target)
    return target


def make_model(arch: str, *, seed: int = 0, **overrides: Any) -> Any:
    """The model of `make_checkpoint` in float32, with transformers' own eager attention."""
    kind, settings = CONFIGS[arch]
    logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(kind, **{**settings, **overrides})
    implementation = {"attn_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_config(config, **implementation)
    spread_weights(model, seed)
    return model.eval()


def spread_weights(model: Any, seed: int) -> None:
    """Random weights wide enough that attention is not uniform and no norm or bias is idle."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15, generator=generator)
            elif _is_plain_norm(name, model):
                parameter.normal_(1.0, 0.3, generator=generator)
            else:
                parameter.normal_(0.0, 0.3, generator=generator)


def _is_plain_norm(name: str, model: Any) -> bool:
    """True for norm weights around one (Gemma's are around zero: it adds the one itself)."""
    norm = "norm" in name or ".ln_" in name
    return norm and name.endswith("weight") and not model.config.model_type.startswith("gemma")


def _publish_as_gpt2(directory: Path, config: Any) -> None:
    """As gpt2 was published: no `transformer.` in front, and a causal mask in each layer."""
    path = directory / "model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(path).items()}
    size = config.n_positions
    for layer in range(config.n_layer):
        mask = torch.tril(torch.ones(size, size)).view(1, 1, size, size)
        tensors[f"h.{layer}.attn.bias"] = mask
    save_file(tensors, path, metadata={"format": "pt"})


CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> Tokenizer:
    """A byte-level tokenizer: 256 bytes, `<s>` in front, `</s>` to end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS_ID)]
    )
    return backend


def write_tokenizer_files(directory: Path) -> None:
    """A byte-level tokenizer with a chat template, as transformers writes one."""
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def edit_config(directory: Path, **changes: Any) -> None:
    """Changes entries of a written config.json; None takes an entry away."""
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
