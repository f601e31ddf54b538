"""The configuration of a checkpoint, read offline and checked before anything is built."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any, Final, Literal

from ..ir.errors import CheckpointError, UnsupportedModelError
from .quiet import quiet_transformers

# Bounds far above any real model: beyond them a number is a mistake, and would cost memory.
_BOUNDS: Final = {
    "num_hidden_layers": 1 << 12,
    "hidden_size": 1 << 18,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 14,
    "intermediate_size": 1 << 22,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 31,
    "num_local_experts": 1 << 14,
}
# What a model is made of. Others of a checkpoint directory, such as prose, may be anything.
_SUFFIXES: Final = frozenset({".json", ".safetensors", ".jinja", ".model", ".tiktoken", ".txt"})
_REQUIRED: Final = ("num_hidden_layers", "hidden_size", "vocab_size")
_LAYER_TYPES: Final = frozenset({"full_attention", "sliding_attention"})


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file; CheckpointError where it is missing or no object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("is missing", where=str(path)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(path)) from error
    if not isinstance(data, dict):
        raise CheckpointError("is not a JSON object", where=str(path))
    return data


def read_config(directory: Path, *, allow_remote_code: bool = False) -> Any:
    """The transformers configuration of a checkpoint directory, with its text part alone.

    Raises CheckpointError for a missing, malformed or absurd `config.json`,
    UnsupportedModelError for what infc does not compile.
    """
    if not directory.is_dir():
        raise CheckpointError("no such checkpoint directory", where=str(directory))
    _check_links(directory)
    path = directory / "config.json"
    raw = read_json(path)
    _check_kind(raw, path, allow_remote_code)
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=allow_remote_code
            )
    except Exception as error:
        # Each configuration class validates in its own way, and raises what it likes.
        raise CheckpointError(f"is not valid: {_one_line(error)}", where=str(path)) from error
    _check_supported(config, path)
    _check_sizes(config, path)
    return config


def _check_links(directory: Path) -> None:
    """Every link must lead somewhere: one that does not would pass for a file that is absent."""
    for path in sorted(directory.iterdir()):
        if path.is_symlink() and path.suffix in _SUFFIXES and not path.exists():
            raise CheckpointError(
                f"is a link to {os.readlink(path)}, which is not there",
                where=str(path),
                hint="download the checkpoint again",
            )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _check_kind(raw: dict[str, Any], path: Path, allow_remote_code: bool) -> None:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError("does not say model_type", where=str(path))
    if "quantization_config" in raw:
        method = raw["quantization_config"]
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise UnsupportedModelError(
            f"the checkpoint is quantised already ({name}), which is not supported",
            where=str(path),
            hint="start from weights in bfloat16 or float32, and let the recipe quantise them",
        )
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    if "auto_map" in raw:
        if allow_remote_code:
            return
        raise UnsupportedModelError(
            f"model type {kind} needs code that comes with the checkpoint, which never runs "
            "unless it is allowed",
            where=str(path),
        )
    if kind in CONFIG_MAPPING:
        raise UnsupportedModelError(f"{kind} is not a causal language model", where=str(path))
    near = difflib.get_close_matches(kind, list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), 1)
    raise UnsupportedModelError(
        f"unknown model type {kind!r}",
        where=str(path),
        hint=f"did you mean {near[0]}?" if near else None,
    )


def _check_supported(config: Any, path: Path) -> None:
    where = str(path)
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{kind} has an encoder", where=where)
    if getattr(config, "alibi", False):
        raise UnsupportedModelError(f"{kind} uses alibi, which is not supported", where=where)
    _check_attention(config, where)
    if getattr(config, "num_attention_heads", None) is None:
        raise UnsupportedModelError(f"{kind} has no attention heads", where=where)
    for layer, one in enumerate(getattr(config, "layer_types", None) or ()):
        if one not in _LAYER_TYPES:
            raise UnsupportedModelError(
                f"layer {layer} of {kind} is of type {one}, not attention", where=where
            )


def _check_attention(config: Any, where: str) -> None:
    """The model's class must compute attention where infc listens."""
    if attention_call(config) is None:
        raise UnsupportedModelError(
            f"{config.model_type} computes attention in code of its own, which infc does not see",
            where=where,
        )


def attention_call(config: Any) -> Literal["interface", "sdpa"] | None:
    """What a model computes attention by: the library's attention interface, torch's own function
    alone, or neither."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return "interface"  # code of the checkpoint's own, which was allowed: capture decides
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if model._can_set_attn_implementation():
        return "interface"
    return "sdpa" if model._supports_sdpa else None


def _check_sizes(config: Any, path: Path) -> None:
    where = str(path)
    for name, bound in _BOUNDS.items():
        value = getattr(config, name, None)
        if value is None and name not in _REQUIRED:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= bound:
            raise CheckpointError(f"{name} is {value!r}, expected 1 to {bound}", where=where)
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    if heads % groups:
        raise CheckpointError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}",
            where=where,
        )
    if getattr(config, "head_dim", None) is None and config.hidden_size % heads:
        raise CheckpointError(
            f"hidden_size {config.hidden_size} is not a multiple of num_attention_heads {heads}",
            where=where,
        )
