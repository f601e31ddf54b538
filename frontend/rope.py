"""Rotary frequencies that depend on the sequence length, fixed at compile time by `max_context`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from ..ir.errors import UnsupportedModelError


def fix_length_dependent_rope(
    model: torch.nn.Module, max_context: int, log: Callable[[str], None]
) -> None:
    """Makes `dynamic` and `longrope` frequencies constants, in place, and says so.

    The frequencies buffers must hold real values. `longrope` takes its long factors where
    `max_context` tokens need them, `dynamic` the base of a sequence of `max_context` tokens.
    UnsupportedModelError where layers of one type have such a rope of their own.
    """
    for name, module in model.named_modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, dict):
            for layer_type, one in kind.items():
                if one == "longrope" or "dynamic" in one:
                    raise UnsupportedModelError(
                        f"rope {one} for {layer_type} layers depends on the length", where=name
                    )
        elif isinstance(kind, str) and "dynamic" in kind:
            _fix_dynamic(module, kind, max_context, log)
        elif kind == "longrope":
            _fix_longrope(module, max_context, log)
        elif isinstance(kind, str) and hasattr(module, "rope_init_fn"):
            _fix_recomputed(module, module.attention_scaling)


def _fix_dynamic(
    module: torch.nn.Module, kind: str, max_context: int, log: Callable[[str], None]
) -> None:
    """The base that transformers takes for a sequence of `max_context` tokens, for every length."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    limit = int(getattr(module, "original_max_seq_len", 0))
    if max_context > limit:
        frequencies, _ = ROPE_INIT_FUNCTIONS[kind](module.config, seq_len=max_context)
        with torch.no_grad():
            module.inv_freq.copy_(frequencies)  # type: ignore[operator]
    module.rope_type = "default"  # type: ignore[assignment]
    what = f"that of {max_context} tokens" if max_context > limit else f"that of up to {limit}"
    log(f"rope {kind}: {what} for every length, chosen by max_context {max_context}")


def _fix_longrope(module: torch.nn.Module, max_context: int, log: Callable[[str], None]) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = module.config
    parameters: Any = config.rope_parameters  # type: ignore[union-attr]
    original = parameters["original_max_position_embeddings"]
    long = max_context > original
    recomputed = hasattr(module, "rope_init_fn")
    if recomputed:
        # Such a model takes its short factors always, and its scale alone by the length.
        _fix_recomputed(module, parameters["long_mscale" if long else "short_mscale"])
    elif long:
        frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](config, seq_len=max_context)
        with torch.no_grad():
            module.inv_freq.copy_(frequencies)  # type: ignore[operator]
    module.rope_type = "default"  # type: ignore[assignment]
    if not recomputed and parameters["short_factor"] == parameters["long_factor"]:
        return  # factors that no length changes
    side = "long" if long else "short"
    what = f"short factors and {side} scale" if recomputed else f"{side} factors"
    log(f"rope longrope: {what} for every length, chosen by max_context {max_context}")


def _fix_recomputed(module: Any, scale: Any) -> None:
    """Frequencies that the model computes again in each call are the buffer that holds them."""
    config = copy.copy(module.config)
    config.rope_parameters = {**config.rope_parameters, "rope_type": "default"}
    module.config = config
    module.rope_init_fn = lambda _: (module.inv_freq, scale)
