"""Values of a `config.json` that would fail far from their key: refused by name before capture."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from ..ir.errors import CheckpointError

_ROPE_KEYS: Final = ("rope_parameters", "rope_scaling")
_ACTIVATIONS: Final = ("hidden_act", "hidden_activation", "activation_function")


def check_raw_values(raw: Mapping[str, Any], path: Path) -> None:
    """Refuses numbers and types that no model has, in a configuration and in its text part.

    Raises CheckpointError, naming file and key.
    """
    _check_part(raw, "", path)
    part = raw.get("text_config")
    if isinstance(part, dict):
        _check_part(part, "text_config.", path)


def check_names(text: Any, path: Path) -> None:
    """Refuses an activation or a kind of rope that transformers does not know.

    `text` is the configuration as transformers reads it. Raises CheckpointError.
    """
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for key in _ACTIVATIONS:
        name = getattr(text, key, None)
        if isinstance(name, str) and name not in ACT2FN:
            raise CheckpointError(f"{key} {name!r} is not known", where=str(path))
    for prefix, rope in _ropes("rope_parameters", getattr(text, "rope_parameters", None)):
        kind = rope.get("rope_type")
        if kind is not None and kind != "default" and kind not in ROPE_INIT_FUNCTIONS:
            raise CheckpointError(f"{prefix}: rope_type {kind!r} is not known", where=str(path))


def _check_part(part: Mapping[str, Any], prefix: str, path: Path) -> None:
    for key, value in part.items():
        if key.endswith(("_eps", "_epsilon")):
            _check_number(prefix + key, value, path, zero=True)
    _check_number(f"{prefix}rope_theta", part.get("rope_theta"), path)
    for key in _ROPE_KEYS:
        for name, rope in _ropes(prefix + key, part.get(key)):
            for number in ("rope_theta", "factor"):
                _check_number(f"{name}.{number}", rope.get(number), path)
    heads = part.get("num_attention_heads")
    if isinstance(heads, int) and heads < 1:
        message = f"{prefix}num_attention_heads is {heads!r}, expected 1 or more"
        raise CheckpointError(message, where=str(path))
    for key in ("dtype", "torch_dtype"):
        _check_dtype(prefix + key, part.get(key), path)


def _ropes(name: str, value: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The parameters of rope, and those of each type of layer where they differ."""
    if isinstance(value, dict):
        yield name, value
        for kind, own in value.items():
            if isinstance(own, dict):
                yield f"{name}.{kind}", own


def _check_number(key: str, value: Any, path: Path, *, zero: bool = False) -> None:
    if value is None:
        return
    if isinstance(value, list):  # one for each layer, 0 for one that has none
        for one in value:
            _check_number(key, one, path, zero=True)
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= sys.float_info.max or (value == 0 and not zero):
        expected = "a finite number, 0 or more" if zero else "a finite number above 0"
        raise CheckpointError(f"{key} is {value!r}, expected {expected}", where=str(path))


def _check_dtype(key: str, value: Any, path: Path) -> None:
    import torch

    if not isinstance(value, str) or value == "auto":
        return
    if not isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype):
        raise CheckpointError(f"{key} {value!r} is not known", where=str(path))
