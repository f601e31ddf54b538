"""A model without weights: parameters are fake tensors, computed buffers hold real values."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from ..ir.errors import UnsupportedModelError
from .config import attention_call
from .hooks import INTERFACE_NAME, register_hooks
from .quiet import quiet_transformers
from .rope import fix_length_dependent_rope
from .sdpa import SDPA_NAME


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model on fake tensors, and the real values of the buffers that no checkpoint holds.

    `parameters` maps every name that the state dict knows (tied names included) to the first
    name of the same tensor.
    """

    model: Any
    mode: FakeTensorMode
    buffers: Mapping[str, torch.Tensor]
    parameters: Mapping[str, str]


def build_skeleton(
    config: Any, dtype: torch.dtype, max_context: int, log: Callable[[str], None]
) -> Skeleton:
    """Builds the causal model of `config` without allocating its parameters.

    Raises UnsupportedModelError where the library cannot build it on the meta device or under
    our attention interface.
    """
    register_hooks()
    implementation = INTERFACE_NAME if attention_call(config) == "interface" else SDPA_NAME
    config = copy.deepcopy(config)  # building writes the implementation's name into it
    try:
        with quiet_transformers(), torch.device("meta"):
            model = _auto_class(config).from_config(
                config, attn_implementation=implementation, dtype=dtype
            )
    except Exception as error:
        # Whatever the model's own code, or a library that it wants, does not find or expect.
        raise UnsupportedModelError(
            f"{config.model_type} cannot be built: {_first_line(error)}"
        ) from error
    model.eval()
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation_internal = INTERFACE_NAME
    _keep_wide(model, dtype)
    _compute_buffers(model)
    fix_length_dependent_rope(model, max_context, log)
    buffers = {
        name: buffer
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if buffer.device.type != "meta"
    }
    parameters = _canonical_names(model)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    _make_fake(model, mode)
    return Skeleton(model, mode, buffers, parameters)


def _auto_class(config: Any) -> Any:
    """What builds a model of `config`: one of text alone, unless the library knows it as more."""
    causal, multimodal = AutoModelForCausalLM, AutoModelForMultimodalLM
    more = type(config) in multimodal._model_mapping and type(config) not in causal._model_mapping
    return multimodal if more else causal


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _keep_wide(model: Any, dtype: torch.dtype) -> None:
    """Float32 for the parameters and buffers that the library loads so whatever `dtype` is."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return
    kept, _, _ = build_glob_alternation(list(plan))
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.dtype == dtype and kept.search(name):
            tensor.data = tensor.data.float()


def _compute_buffers(model: Any) -> None:
    """Gives every buffer outside the checkpoint its real value, as the library initialises it."""
    owners: dict[str, Any] = {}
    for name, module in model.named_modules():
        # A part that is a model itself initialises what lies in it.
        owner = owners.get(name.rpartition(".")[0], model)
        owner = owners[name] = module if isinstance(module, PreTrainedModel) else owner
        pending = []
        for key in sorted(module._non_persistent_buffers_set):
            buffer = module._buffers[key]
            if buffer is None or buffer.device.type != "meta":
                continue
            module._buffers[key] = torch.full(
                buffer.shape, _unset(buffer.dtype), dtype=buffer.dtype
            )
            pending.append(key)
        if not pending:
            continue
        with torch.no_grad():
            owner._init_weights(module)
        for key in pending:
            value = module._buffers[key]
            unset = value.isnan() if value.is_floating_point() else value == _unset(value.dtype)
            if value.numel() and bool(unset.any()):
                raise UnsupportedModelError(
                    f"buffer {key} is not in the checkpoint and the library does not compute it",
                    where=name,
                )


def _unset(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return math.nan
    return False if dtype == torch.bool else int(torch.iinfo(dtype).min)


def _canonical_names(model: Any) -> dict[str, str]:
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names[name] = first.setdefault(id(tensor), name)
    return names


def _make_fake(model: Any, mode: FakeTensorMode) -> None:
    """Replaces every parameter and buffer by a fake CPU tensor; tied ones stay tied."""
    made: dict[int, torch.Tensor] = {}
    originals = []  # keeps the old tensors alive, so that no id is used twice
    with mode:
        for module in model.modules():
            for table in (module._parameters, module._buffers):
                for key, tensor in table.items():
                    if tensor is None:
                        continue
                    originals.append(tensor)
                    if id(tensor) not in made:
                        fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                        made[id(tensor)] = (
                            torch.nn.Parameter(fake, requires_grad=False)
                            if isinstance(tensor, torch.nn.Parameter)
                            else fake
                        )
                    table[key] = made[id(tensor)]
