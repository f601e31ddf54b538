"""What transformers calls in place of its attention, mask and experts: one opaque op for each.

The ops have shapes and no kernel: they exist only while a model is traced under fake tensors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..ir.errors import UnsupportedModelError
from .experts import experts_hook

INTERFACE_NAME: Final = "infc"

# Arguments that attention functions are given for other backends' sake; none changes the result.
_HARMLESS: Final = frozenset({"position_ids", "use_cache", "cache_position", "is_causal"})


@dataclass(frozen=True, slots=True)
class CausalMask:
    """What the mask interface returns: causal, and within `window` positions where given."""

    window: int | None


_LIBRARY = torch.library.Library("infc", "DEF")
_LIBRARY.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, int layer, float scale, "
    "int? window, float? softcap) -> Tensor"
)
_LIBRARY.define("layer_begin(Tensor x, int layer, int slot) -> Tensor")
_LIBRARY.define("layer_end(Tensor x, int layer) -> Tensor")
_LIBRARY.define("repeat_layer(Tensor[] args, int layer) -> Tensor")


def _attention_shape(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _same_shape(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape)


def _first_shape(args: list[torch.Tensor], layer: int) -> torch.Tensor:
    return args[0].new_empty(args[0].shape)


torch.library.register_fake("infc::attention", _attention_shape, lib=_LIBRARY)
torch.library.register_fake("infc::layer_begin", _same_shape, lib=_LIBRARY)
torch.library.register_fake("infc::layer_end", _same_shape, lib=_LIBRARY)
torch.library.register_fake("infc::repeat_layer", _first_shape, lib=_LIBRARY)


def refuse(layer: int | None, reason: str) -> UnsupportedModelError:
    """The error for something in a layer that the IR cannot say."""
    return UnsupportedModelError(reason, where=None if layer is None else f"layer {layer}")


def attention_hook(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer as one op; q, k, v are `[1, heads, T, head_dim]`.

    The mask decides the window, as it does in the library's own eager attention. Raises
    UnsupportedModelError for whatever the op cannot say.
    """
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise refuse(None, f"attention {type(module).__name__} has no layer index")
    window = attention_mask.window if isinstance(attention_mask, CausalMask) else None
    if sliding_window is not None and window is not None and sliding_window != window:
        raise refuse(layer, f"attention names window {sliding_window}, its mask {window}")
    if dropout:
        raise refuse(layer, f"attention has dropout {dropout}")
    if kwargs.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise refuse(layer, "attention is not causal")
    for name, argument in kwargs.items():
        if name not in _HARMLESS and argument is not None and argument is not False:
            raise refuse(layer, f"attention has an argument {name} that is not supported")
    return attention_op(layer, query, key, value, attention_mask, scaling, softcap, s_aux), None


def attention_op(
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: object,
    scale: float | None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The op `[1, T, heads, value_dim]` of q, k, v `[1, heads, T, head_dim]`.

    Raises UnsupportedModelError for a mask that is not ours.
    """
    if not isinstance(mask, CausalMask):
        raise refuse(layer, "attention is not causal, or the model creates its own mask")
    return torch.ops.infc.attention(  # type: ignore[no-any-return]
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        sinks,
        layer,
        float(query.shape[-1]) ** -0.5 if scale is None else float(scale),
        mask.window,
        None if softcap is None else float(softcap),
    )


def mask_hook(*, mask_function: Any, attention_mask: object = None, **_: Any) -> CausalMask:
    """The mask as a value that the attention hook reads; UnsupportedModelError for other kinds."""
    if attention_mask is not None:
        raise UnsupportedModelError("the model creates its own padding mask")
    windows: list[int] = []
    causal = _read_mask(mask_function, windows)
    if not causal:
        raise UnsupportedModelError("an attention mask is not causal")
    return CausalMask(min(windows) if windows else None)


def _read_mask(function: Any, windows: list[int]) -> bool:
    """Collects windows from a composed mask function; True where it is causal."""
    name = getattr(function, "__qualname__", repr(function))
    cells = dict(
        zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        if hasattr(function, "__code__")
        else ()
    )
    if name == "causal_mask_function":
        return True
    if name == "and_masks.<locals>.and_mask":
        parts = [_read_mask(part, windows) for part in cells["mask_functions"].cell_contents]
        return any(parts)
    if name == "sliding_window_overlay.<locals>.inner_mask":
        windows.append(int(cells["sliding_window"].cell_contents))
        return False
    # One prompt is one packed sequence: these two change nothing for ascending positions.
    if name == "packed_sequence_mask_function.<locals>.inner_mask":
        return False
    if name == "remap_positions_for_packed_sequence.<locals>.inner_mask":
        return _read_mask(cells["mask_function"].cell_contents, windows)
    raise UnsupportedModelError(f"attention mask {name.split('.')[0]} is not supported")


def register_hooks() -> None:
    """Makes the three functions known to transformers under the name `infc`; idempotent."""
    ALL_ATTENTION_FUNCTIONS.register(INTERFACE_NAME, attention_hook)
    ALL_MASK_ATTENTION_FUNCTIONS.register(INTERFACE_NAME, mask_hook)
    ALL_EXPERTS_FUNCTIONS.register(INTERFACE_NAME, experts_hook)
