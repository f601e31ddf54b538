"""The rope of a GGUF file as transformers' parameters: kinds of scaling, and tensors of factors."""

from __future__ import annotations

import math
from typing import Any, Final

from ....ir.errors import CheckpointError, UnsupportedModelError
from .header import AGAIN
from .metadata import Metadata
from .tensors import GgufTensors

_FREQUENCIES: Final = "rope_freqs.weight"
_SHORT, _LONG = "rope_factors_short.weight", "rope_factors_long.weight"
_LOG_MULTIPLIER: Final = ".rope.scaling.yarn_log_multiplier"
ROPE_TENSORS: Final = (_FREQUENCIES, _SHORT, _LONG)
"""Tensors that are part of the configuration, and of no layer."""


def rope_parameters(
    metadata: Metadata, tensors: GgufTensors, context: int, pairs: int
) -> dict[str, Any]:
    """What `rope_parameters` of a configuration is.

    `context` is the longest in tokens, `pairs` is how many pairs of a head are turned.

    Raises CheckpointError for numbers that no rope has, UnsupportedModelError for a kind that
    has no counterpart.
    """
    found: dict[str, Any] = {"rope_theta": metadata.number(".rope.freq_base", 10000.0)}
    factor = metadata.number(".rope.scaling.factor", 1.0, zero=True) or 1.0
    # A file that states a factor alone means the oldest kind.
    kind = metadata.text(".rope.scaling.type", "linear")
    if kind == "none" or (kind in ("linear", "yarn") and factor == 1.0):
        found["rope_type"] = "default"
    elif kind == "linear":
        found |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        found |= _yarn(metadata, factor, context)
    elif kind != "longrope":
        raise UnsupportedModelError(
            f"is {kind!r}, which is not supported",
            where=f"{metadata.path}: {metadata.key('.rope.scaling.type')}",
            hint="none, linear, yarn or longrope",
        )
    return _with_factors(found, metadata, tensors, context, pairs)


def _yarn(metadata: Metadata, factor: float, context: int) -> dict[str, Any]:
    original = metadata.optional_count(".rope.scaling.original_context_length")
    found: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original or context,
        "beta_fast": metadata.number(".rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": metadata.number(".rope.scaling.yarn_beta_slow", 1.0),
    }
    if metadata.has(".rope.scaling.yarn_attn_factor"):
        found["attention_factor"] = metadata.number(".rope.scaling.yarn_attn_factor")
        return found
    stretch = metadata.number(".rope.scaling.attn_factor", 1.0)
    multiplier = metadata.number(_LOG_MULTIPLIER, 0.0, zero=True)
    divisor = 1.0 + 0.1 * math.log(factor) * multiplier
    if not 0 < divisor < math.inf:
        raise metadata.error(
            _LOG_MULTIPLIER, f"is {multiplier:g}, which is too large for the factor {factor:g}"
        )
    if (stretch, divisor) != (1.0, 1.0):
        found["attention_factor"] = stretch * (1.0 + 0.1 * math.log(factor)) / divisor
    return found


def _with_factors(
    found: dict[str, Any], metadata: Metadata, tensors: GgufTensors, context: int, pairs: int
) -> dict[str, Any]:
    """With the factors that each frequency is divided by, where tensors of the file hold some.

    Transformers takes any factors as its kind `longrope`. Those of Llama 3.1 and later lie in the
    file as such too, and not as the four numbers that they were made of.
    """
    if _SHORT in tensors.types and _LONG in tensors.types:
        # Its logarithm is a divisor.
        original = metadata.count(".rope.scaling.original_context_length", low=2)
        stretch = context / original
        factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        return found | {
            "rope_type": "longrope",
            "short_factor": _factors(tensors, _SHORT, pairs),
            "long_factor": _factors(tensors, _LONG, pairs),
            "original_max_position_embeddings": original,
            "factor": stretch,
            "attention_factor": metadata.number(".rope.scaling.attn_factor", factor),
        }
    if _FREQUENCIES not in tensors.types:
        if found.get("rope_type") is None:
            raise metadata.error(
                ".rope.scaling.type", f"is longrope, and the tensor {_SHORT} or {_LONG} is missing"
            )
        return found
    factors = _factors(tensors, _FREQUENCIES, pairs)
    if all(one == 1.0 for one in factors):
        return found
    if found.get("rope_type") != "default":
        raise UnsupportedModelError(
            f"divides frequencies that are scaled by {found.get('rope_type')} as well",
            where=f"{tensors.path}: {_FREQUENCIES}",
        )
    return found | {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "original_max_position_embeddings": context,
        "factor": 1.0,
        "attention_factor": 1.0,
    }


def _factors(tensors: GgufTensors, name: str, pairs: int) -> list[float]:
    from ....ir.weights import require_finite

    values = tensors.tensor(name).float().reshape(-1)
    require_finite(values, f"{tensors.path}: {name}")
    if len(values) != pairs or not bool((values > 0).all()):
        raise CheckpointError(
            f"holds {len(values)} factors, expected {pairs} above 0",
            where=f"{tensors.path}: {name}",
            hint=AGAIN,
        )
    numbers: list[float] = values.tolist()
    return numbers
