"""Keys of a model's architecture that are not read: refused where they change its meaning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from ....ir.errors import UnsupportedModelError
from .metadata import Metadata

# What these must be where a model has no use for them: whatever else they are would be lost.
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    ".attention.causal": (True,),
    ".attention.clamp_kqv": (0,),
    ".attention.max_alibi_bias": (0,),
    ".attention.scale": (0,),
    ".attention.sliding_window": (0,),
    ".attention.temperature_scale": (0,),
    ".attn_logit_softcapping": (0,),
    ".deepstack_mapping": (),
    ".embedding_scale": (0, 1),
    ".expert_count": (0,),
    ".expert_gating_func": (0, 1),
    ".expert_group_count": (0, 1),
    ".expert_shared_count": (0,),
    ".expert_weights_scale": (0, 1),
    ".final_logit_softcapping": (0,),
    ".interleave_moe_layer_step": (0, 1),
    ".leading_dense_block_count": (0,),
    ".logit_scale": (0, 1),
    ".nextn_predict_layers": (0,),
    ".pooling_type": (0,),
    ".residual_scale": (0, 1),
    ".rope.scale_linear": (0, 1),
    ".rope.scaling.attn_factor": (1,),
    ".use_parallel_residual": (False,),
}
# What follows from other keys, or is of no use to whoever runs the model.
_IDLE: Final = (
    ".expert_used_count",
    ".rope.scaling.finetuned",
    ".rope.scaling.original_context_length",
    ".rope.scaling.yarn_ext_factor",
    ".tensor_data_layout",
    ".vocab_size",
)


def check_unmapped(metadata: Metadata, log: Callable[[str], None]) -> None:
    """Says which keys of the architecture have no effect.

    Raises UnsupportedModelError, naming the key, for one that a model of transformers would lack.
    """
    known = {metadata.key(name): accepted for name, accepted in _NEUTRAL.items()}
    idle = {metadata.key(name) for name in _IDLE}
    unknown = []
    for key in sorted(metadata.values.keys() - metadata.read - idle):
        if key in known:
            value = metadata.values[key]
            if not any(isinstance(value, int | float) and value == one for one in known[key]):
                raise UnsupportedModelError(
                    f"is {value!r}, which is not supported for {metadata.architecture}",
                    where=f"{metadata.path}: {key}",
                )
        elif key.startswith(f"{metadata.architecture}."):
            unknown.append(key)
    if unknown:
        log(f"keys of the GGUF file without effect: {', '.join(unknown)}")
