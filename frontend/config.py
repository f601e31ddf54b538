"""The configuration of a checkpoint, read offline and checked before anything is built."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final, Literal

from ..ir.errors import CheckpointError, UnsupportedModelError
from ..ir.nearest import did_you_mean
from .config_values import check_names, check_raw_values
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
# Where tools that quantize say so, other than in config.json.
_QUANTIZATION_FILES: Final = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_METHODS: Final = ("quant_algo", "quant_method", "bits", "w_bit")
_UNQUANTIZED: Final = "start from weights in bfloat16 or float32, and let the recipe quantize them"
_REQUIRED: Final = ("num_hidden_layers", "hidden_size", "vocab_size")
_LAYER_TYPES: Final = frozenset({"full_attention", "sliding_attention"})


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file; CheckpointError where it is missing or no object."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise CheckpointError("is not a regular file", where=str(path))
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("is missing", where=str(path)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot be read: {error}", where=str(path)) from error
    if not isinstance(data, dict):
        raise CheckpointError("is not a JSON object", where=str(path))
    return data


def read_config(directory: Path, *, allow_remote_code: bool = False) -> Any:
    """The transformers configuration of a checkpoint directory; `text_part` is what is compiled.

    Raises CheckpointError for a missing, malformed or absurd `config.json`,
    UnsupportedModelError for what infc does not compile.
    """
    if not directory.is_dir():
        raise CheckpointError("no such checkpoint directory", where=str(directory))
    _check_links(directory)
    _check_quantization_files(directory)
    path = directory / "config.json"
    raw = read_json(path)
    _check_kind(raw, path, allow_remote_code)
    check_raw_values(raw, path)
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=allow_remote_code
            )
    except Exception as error:
        # Each configuration class validates in its own way, and raises what it likes.
        raise CheckpointError(f"is not valid: {_one_line(error)}", where=str(path)) from error
    _check_config(config, path)
    return config


def make_config(entries: dict[str, Any], path: Path) -> Any:
    """The transformers configuration of entries as `config.json` has them, found in `path`.

    Raises as `read_config`.
    """
    check_raw_values(entries, path)
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            config = AutoConfig.for_model(**entries)
    except Exception as error:
        # As above.
        raise CheckpointError(
            f"describes no valid model: {_one_line(error)}", where=str(path)
        ) from error
    _check_config(config, path)
    return config


def _check_config(config: Any, path: Path) -> None:
    _check_supported(config, path)
    _check_sizes(text_part(config), path)
    if model_class(config) is not None:
        check_names(text_part(config), path)


def _check_links(directory: Path) -> None:
    """Every link must lead somewhere: one that does not would pass for a file that is absent."""
    for path in sorted(directory.iterdir()):
        if path.is_symlink() and path.suffix in _SUFFIXES and not path.exists():
            raise CheckpointError(
                f"is a link to {os.readlink(path)}, which is not there",
                where=str(path),
                hint="download the checkpoint again",
            )
        if path.suffix in _SUFFIXES and path.exists() and not (path.is_file() or path.is_dir()):
            raise CheckpointError("is not a regular file", where=str(path))


def _check_quantization_files(directory: Path) -> None:
    """A file that names no method for the weights, or was left behind empty, says nothing."""
    for path in (directory / name for name in _QUANTIZATION_FILES):
        data = read_json(path) if path.exists() else {}
        inner = data.get("quantization")
        places = (data, inner if isinstance(inner, dict) else {})
        method = next((p[key] for p in places for key in _METHODS if p.get(key) is not None), None)
        if method is not None:
            raise UnsupportedModelError(
                f"the checkpoint is already quantized ({method}), which is not supported",
                where=str(path),
                hint=_UNQUANTIZED,
            )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def text_part(config: Any) -> Any:
    """The configuration of the part that reads and writes text: of most models, all of it."""
    return config.get_text_config(decoder=True)


def _check_kind(raw: dict[str, Any], path: Path, allow_remote_code: bool) -> None:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )

    kind = raw.get("model_type")
    if not isinstance(kind, str):
        raise CheckpointError("does not contain model_type", where=str(path))
    method = _quantization(raw)
    if method is not None:
        name = method.get("quant_method") if isinstance(method, dict) else method
        raise UnsupportedModelError(
            f"the checkpoint is already quantized ({name}), which is not supported",
            where=str(path),
            hint=_UNQUANTIZED,
        )
    known = {**MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    if kind in known:
        return
    if "auto_map" in raw:
        if allow_remote_code:
            return
        raise UnsupportedModelError(
            f"model type {kind} requires code from the checkpoint, which only runs "
            "if the recipe allows it",
            where=str(path),
        )
    if kind in CONFIG_MAPPING:
        raise UnsupportedModelError(f"{kind} is not a causal language model", where=str(path))
    raise UnsupportedModelError(
        f"unknown model type {kind!r}", where=str(path), hint=did_you_mean(kind, known)
    )


def _quantization(raw: dict[str, Any]) -> Any:
    """What a configuration, or that of its text part, says of quantisation; null says nothing."""
    part = raw.get("text_config")
    places = (raw, part if isinstance(part, dict) else {})
    keys = ("quantization_config", "compression_config")
    methods = (place.get(key) for place in places for key in keys)
    return next((method for method in methods if method is not None), None)


def _check_supported(config: Any, path: Path) -> None:
    where = str(path)
    text = text_part(config)
    if isinstance(text, dict):
        raise CheckpointError(
            f"has a text_config, which {config.model_type} does not have",
            where=where,
            hint="remove text_config, or correct model_type",
        )
    kind = text.model_type
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{config.model_type} has an encoder", where=where)
    if getattr(text, "alibi", False):
        raise UnsupportedModelError(f"{kind} uses alibi, which is not supported", where=where)
    if attention_call(config) is None:
        raise UnsupportedModelError(
            f"{config.model_type} does not use the attention interface of transformers,"
            " so infc cannot capture it",
            where=where,
        )
    if None in _values(text, "num_attention_heads"):
        raise UnsupportedModelError(f"{kind} has no attention heads", where=where)
    for layer, one in enumerate(getattr(text, "layer_types", None) or ()):
        if one not in _LAYER_TYPES:
            raise UnsupportedModelError(
                f"layer {layer} of {kind} is of type {one}, not attention", where=where
            )


def attention_call(config: Any) -> Literal["interface", "sdpa"] | None:
    """What a model computes attention by: the library's attention interface, torch's own function
    alone, or neither."""
    model = model_class(config)
    if model is None:
        return "interface"  # code of the checkpoint's own, which was allowed: capture decides
    if model._can_set_attn_implementation():
        return "interface"
    return "sdpa" if model._supports_sdpa else None


def model_class(config: Any) -> Any:
    """The library's class of a model; None for code of the checkpoint's own.

    A model that also takes images or sounds is built whole: what text alone goes through then is
    what the library itself computes for text.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
    )

    for known in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING):
        if type(config) in known:
            return known[type(config)]
    return None


def _values(config: Any, name: str) -> list[Any]:
    """An attribute's value, or the values of all layers where layers differ; None for absent."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # the library's word for a value that is not one for all layers
        return [getattr(layer, name, None) for layer in config.per_layer_config]
    return value if isinstance(value, list) and value else [value]


def _check_sizes(config: Any, path: Path) -> None:
    where = str(path)
    for name, bound in _BOUNDS.items():
        for value in _values(config, name):
            if value is None and name not in _REQUIRED:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= bound:
                raise CheckpointError(f"{name} is {value!r}, expected 1 to {bound}", where=where)
    heads = _values(config, "num_attention_heads")
    groups = _values(config, "num_key_value_heads")
    sizes = _values(config, "head_dim")
    for layer in range(max(len(heads), len(groups), len(sizes))):
        own = [values[layer % len(values)] for values in (heads, groups, sizes)]
        _check_heads(_values(config, "hidden_size")[0], own[0], own[1], own[2], where)


def _check_heads(
    hidden_size: int, heads: int, groups: int | None, size: int | None, where: str
) -> None:
    """Query heads share key-value heads evenly, and without a size of their own the hidden one."""
    if heads % (groups or heads):
        raise CheckpointError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}",
            where=where,
        )
    if size is None and hidden_size % heads:
        raise CheckpointError(
            f"hidden_size {hidden_size} is not a multiple of num_attention_heads {heads}",
            where=where,
        )
