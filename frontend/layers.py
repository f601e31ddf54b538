"""Equal decoder layers are traced once: the others become one opaque op each, cloned later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .hooks import CausalMask

# State of nn.Module itself, the layer's own number, and links that every layer shares.
_IGNORED = frozenset({"training", "layer_idx", "layer_id", "config", "gradient_checkpointing"})
_PLAIN = (bool, int, float, str, type(None), CausalMask)
MIN_LAYERS_TO_REPEAT = 4

_TRACED: ContextVar[int | None] = ContextVar("traced layer", default=None)


def traced_layer() -> int | None:
    """The decoder layer that is being traced; None outside of them all."""
    return _TRACED.get()


class NotRepeatableError(Exception):
    """Layers that looked equal were called in different ways; trace them all."""


@dataclass(slots=True)
class _Call:
    """How the first layer of a signature was called, and what it returned.

    `handed` are the tensors in containers among its arguments, by which layers hand on keys and
    values to later ones.
    """

    in_spec: pytree.TreeSpec
    in_plain: list[Any]
    handed: list[Any]
    out_spec: pytree.TreeSpec
    out_plain: list[Any]


@dataclass(slots=True)
class LayerStack:
    """The decoder layers of one model, and which of them are traced.

    `templates[i]` is the layer whose traced nodes layer i repeats, or i where it is traced;
    `prefix` is what stands before the number in the layers' parameter names. A layer that is
    repeated hands nothing on, and finds what its template found.
    """

    prefix: str
    templates: list[int]
    checks: dict[int, int]
    calls: dict[int, _Call] = field(default_factory=dict)


def find_decoder_layers(model: Any, num_layers: int) -> tuple[str, torch.nn.ModuleList] | None:
    """The one outermost module list of `num_layers` layers and its name; None where none is.

    What a model has beside its decoder, such as a part for images, is left out.
    """
    decoder = set(model.get_decoder().modules()) if hasattr(model, "get_decoder") else None
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers
        if decoder is None or module in decoder
    ]
    outer = [
        (name, module)
        for name, module in found
        if not any(name.startswith(f"{other}.") for other, _ in found)
    ]
    return outer[0] if len(outer) == 1 else None


def mark_layers(model: Any, num_layers: int, *, repeat: bool) -> LayerStack | None:
    """Wraps the decoder layers so that a trace shows where each begins and ends.

    With `repeat`, layers of one signature beyond its first and last are not traced: they call
    one opaque op. None where the model has no recognisable list of layers.
    """
    found = find_decoder_layers(model, num_layers)
    if found is None:
        return None
    name, layers = found
    signatures = [_signature(layer) for layer in layers]
    templates = list(range(num_layers))
    checks: dict[int, int] = {}
    if repeat:
        for signature, count in Counter(signatures).items():
            members = [i for i, one in enumerate(signatures) if one == signature]
            if count < MIN_LAYERS_TO_REPEAT:
                continue
            checks[members[0]] = members[-1]
            for i in members[1:-1]:
                templates[i] = members[0]
    stack = LayerStack(f"{name}.", templates, checks)
    for i, layer in enumerate(layers):
        layer.forward = _Wrapped(stack, i, layer.forward)
    return stack


class _Wrapped:
    """A layer's forward between markers, or one opaque op in its place."""

    def __init__(self, stack: LayerStack, index: int, forward: Any) -> None:
        self.stack = stack
        self.index = index
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        plain = [_plain(leaf) for leaf in leaves]
        template = self.stack.templates[self.index]
        handed = _handed(leaves)
        if template != self.index:
            return self._repeat(template, tensors, plain, handed, spec)
        slots = iter(range(len(tensors)))
        marked = [
            torch.ops.infc.layer_begin(leaf, self.index, next(slots))
            if isinstance(leaf, torch.Tensor)
            else leaf
            for leaf in leaves
        ]
        args, kwargs = pytree.tree_unflatten(marked, spec)
        token = _TRACED.set(self.index)
        try:
            outputs, out_spec = pytree.tree_flatten(self.forward(*args, **kwargs))
        finally:
            _TRACED.reset(token)
        if self.index in self.stack.checks:
            self._check_outputs(tensors, outputs)
            if not _same(_handed(leaves), handed):
                raise NotRepeatableError(
                    "one of several equal layers hands values on to later ones"
                )
            out_plain = [_plain(leaf) for leaf in outputs]
            self.stack.calls[self.index] = _Call(spec, plain, handed, out_spec, out_plain)
        ended = [
            torch.ops.infc.layer_end(leaf, self.index) if isinstance(leaf, torch.Tensor) else leaf
            for leaf in outputs
        ]
        return pytree.tree_unflatten(ended, out_spec)

    def _check_outputs(self, tensors: list[torch.Tensor], outputs: list[Any]) -> None:
        made = [leaf for leaf in outputs if isinstance(leaf, torch.Tensor)]
        if len(made) != 1 or not tensors:
            raise NotRepeatableError("a layer returns more than its hidden states")
        like = tensors[0]
        if made[0].shape != like.shape or made[0].dtype != like.dtype:
            raise NotRepeatableError("a layer returns another shape than it is given")

    def _repeat(
        self,
        template: int,
        tensors: list[torch.Tensor],
        plain: list[Any],
        handed: list[Any],
        spec: pytree.TreeSpec,
    ) -> Any:
        call = self.stack.calls.get(template)
        alike = call is not None and spec == call.in_spec and _equal(plain, call.in_plain)
        if call is None or not alike or not _same(handed, call.handed):
            raise NotRepeatableError("equal layers are called in different ways")
        out = torch.ops.infc.repeat_layer(tensors, self.index)
        leaves = [out if leaf is torch.Tensor else leaf for leaf in call.out_plain]
        return pytree.tree_unflatten(leaves, call.out_spec)


def _handed(leaves: list[Any]) -> list[Any]:
    """What lies in the containers among a layer's arguments that are passed on as they are."""
    containers = [leaf for leaf in leaves if isinstance(leaf, Mapping)]
    return [part for one in containers for part in pytree.tree_leaves(dict(one))]


def _same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))


def _plain(leaf: Any) -> Any:
    return torch.Tensor if isinstance(leaf, torch.Tensor) else leaf


def _equal(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(
        a is b or (isinstance(a, _PLAIN) and isinstance(b, _PLAIN) and a == b)
        for a, b in zip(left, right, strict=True)
    )


def _signature(module: torch.nn.Module) -> tuple[Any, ...]:
    """What decides the trace of a layer: classes, plain attributes, shapes of its tensors."""
    own = sorted(
        (key, _attribute(value))
        for key, value in vars(module).items()
        if (key not in _IGNORED and not key.startswith("_")) or _is_of_one_layer(value)
    )
    tensors = [
        (key, None if tensor is None else (tuple(tensor.shape), str(tensor.dtype)))
        for table in (module._parameters, module._buffers)
        for key, tensor in table.items()
    ]
    children = [(key, _signature(child)) for key, child in module._modules.items() if child]
    return (type(module).__qualname__, tuple(own), tuple(tensors), tuple(children))


def _is_of_one_layer(value: Any) -> bool:
    """Whether it is a configuration that the library made for one layer: they may differ."""
    return hasattr(value, "per_layer_config") and hasattr(value, "skip")


def _attribute(value: Any) -> str:
    if _is_of_one_layer(value):
        return _attribute(vars(value))
    if isinstance(value, (_PLAIN, torch.dtype, torch.Size)):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} {[_attribute(v) for v in value]}"
    if isinstance(value, dict):
        return f"dict {[(str(k), _attribute(v)) for k, v in value.items()]}"
    if isinstance(value, partial):
        return f"partial {[_attribute(v) for v in (value.func, value.args, value.keywords)]}"
    # Anything else counts as equal only where it is the very same object.
    return f"object {id(value)}"
