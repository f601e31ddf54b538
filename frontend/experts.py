"""What transformers calls in place of its routed experts, and how it reads their gate."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch.utils._python_dispatch import _disable_current_modes
from transformers.integrations.moe import _default_apply_gate

from ..ir.errors import UnsupportedModelError
from ..ir.ops.experts import expert_gate

_ACTIVATIONS: Final = {
    "SiLUActivation": "silu",
    "SiLU": "silu",
    "silu": "silu",
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
}


_LIBRARY = torch.library.Library("infc", "FRAGMENT")
_LIBRARY.define(
    "moe(Tensor x, Tensor index, Tensor weight, Tensor gate_up, Tensor down, "
    "Tensor? gate_up_bias, Tensor? down_bias, str act, float alpha, float? limit, float shift, "
    "bool transposed, bool interleaved) -> Tensor"
)
torch.library.register_fake("infc::moe", lambda x, *_: x.new_empty(x.shape), lib=_LIBRARY)


@dataclass(frozen=True, slots=True)
class Gate:
    """What joins the halves of an expert's first product: attributes of the op `moe`."""

    act: str
    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0


def experts_hook(
    module: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Routed experts as one op: x `[T, H]`, index and weights `[T, K]`.

    Raises UnsupportedModelError for layouts and gates that the op cannot say.
    """
    name = type(module).__name__
    flags = {
        "no gate": not getattr(module, "has_gate", True),
        "a norm after each expert": getattr(module, "has_post_expert_norm", False),
    }
    for what, present in flags.items():
        if present:
            raise UnsupportedModelError(f"experts {name} have {what}, which is not supported")
    gate = read_gate(module)
    biased = getattr(module, "has_bias", False)
    return torch.ops.infc.moe(  # type: ignore[no-any-return]
        hidden_states,
        top_k_index,
        top_k_weights,
        module.gate_up_proj,
        module.down_proj,
        module.gate_up_proj_bias if biased else None,
        module.down_proj_bias if biased else None,
        gate.act,
        gate.alpha,
        gate.limit,
        gate.shift,
        getattr(module, "is_transposed", False),
        not getattr(module, "is_concatenated", True),
    )


def read_gate(module: Any) -> Gate:
    """The gate of an experts module as the library's decorator leaves one.

    A gate of the module's own is compared with each form that the op has, with the numbers that
    the module holds, on values inside and outside its limits. Raises UnsupportedModelError.
    """
    name, act = type(module).__name__, _activation(module)
    if getattr(type(module), "_apply_gate", None) is _default_apply_gate:
        if act is None:
            raise UnsupportedModelError(
                f"experts {name} use activation {module.act_fn}, which is not supported"
            )
        return Gate(act)
    gates = list(_known_gates(module, act or "silu"))
    reach = 3 * max(gate.limit or 2.0 for gate in gates)
    for gate in gates:
        if _is_gate_of(module, gate, reach):
            return gate
    raise UnsupportedModelError(f"experts {name} have a custom gate that is not supported")


def _activation(module: Any) -> str | None:
    act = getattr(module, "act_fn", None)
    return _ACTIVATIONS.get(getattr(act, "__name__", type(act).__name__))


def _known_gates(module: Any, act: str) -> Iterator[Gate]:
    numbers = {
        key: float(value)
        for key, value in vars(module).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    alphas = [1.0, *(value for key, value in numbers.items() if key.endswith("alpha"))]
    limits = [None, *(value for key, value in numbers.items() if key.endswith("limit"))]
    for alpha, limit, shift in itertools.product(alphas, limits, (0.0, 1.0)):
        if alpha == 1 or act == "silu":
            yield Gate(act, alpha, limit, shift)


def _is_gate_of(module: Any, gate: Gate, reach: float) -> bool:
    """Whether the module's gate computes this one, on a grid of gates and ups up to `reach`."""
    # Export traces whatever runs; this is a question about the module, not a part of the model.
    with _disable_current_modes(), torch.no_grad():
        gates, ups = torch.meshgrid(*2 * [torch.linspace(-reach, reach, 41)], indexing="ij")
        halves = torch.stack([gates.flatten(), ups.flatten()])  # [2, I]
        concatenated = getattr(module, "is_concatenated", True)
        given = halves.flatten() if concatenated else halves.T.flatten()
        found = module._apply_gate(given[None])
        wanted = expert_gate(halves.flatten()[None], **asdict(gate))
        return found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
