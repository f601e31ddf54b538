"""Mixture of experts: each token through the experts it was routed to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ..cost import Cost
from ..errors import ProgramError
from ..schemes import get_scheme
from ..torch_types import from_torch
from ..types import Dim, TensorType
from .base import (
    AttrKind,
    Attrs,
    AttrSpec,
    Kind,
    Op,
    Outputs,
    Types,
    default_cost,
    matrix_dtype,
    need_float,
    need_int,
    need_shape,
    same_dtype,
    tensor,
    wide,
)
from .fused import ACTIVATIONS, activate
from .matrix import linear_meaning
from .quantized import (
    SCHEME,
    check_matrix,
    decoded_linear_meaning,
    quantize_rows_meaning,
    scaled_linear_meaning,
)

if TYPE_CHECKING:
    import torch


def _moe(types: Types, attrs: Attrs) -> Outputs:
    gate_up, down = tensor(types, 3, 3, "gate_up"), tensor(types, 4, 3, "down")
    matrix_dtype(tensor(types, 0), gate_up, down)
    return _check(types, gate_up, down, types[5:], attrs)


def _scaled_moe(types: Types, attrs: Attrs) -> Outputs:
    x = tensor(types, 0, 2, "x")
    gate_up, down = tensor(types, 3, 3, "gate_up"), tensor(types, 5, 3, "down")
    doubled = gate_up.shape[1]
    if not isinstance(doubled, int):
        raise ProgramError(f"gate_up is {gate_up}, expected fixed sizes")
    check_matrix(gate_up, tensor(types, 4), x.shape[1], attrs, "gate_up")
    check_matrix(down, tensor(types, 6), doubled // 2, attrs, "down")
    wide_up = TensorType(gate_up.dtype, (*gate_up.shape[:2], x.shape[1]))
    wide_down = TensorType(down.dtype, (*down.shape[:2], doubled // 2))
    return _check(types, wide_up, wide_down, types[7:], attrs)


def _code_depths(types: Types, attrs: Attrs) -> Mapping[int, Dim]:
    doubled = tensor(types, 3).shape[1]
    assert isinstance(doubled, int), "types were inferred"
    return {3: tensor(types, 0).shape[1], 5: doubled // 2}


def _check(
    types: Types, gate_up: TensorType, down: TensorType, biases: Types, attrs: Attrs
) -> Outputs:
    x = need_float(tensor(types, 0, 2, "x"), "x")
    index = need_int(tensor(types, 1, 2, "index"), "index")
    weight = need_float(tensor(types, 2, 2, "weight"), "weight")
    need_shape(index, (x.shape[0], index.shape[1]), "index")
    need_shape(weight, index.shape, "weight")
    experts, doubled, hidden = gate_up.shape
    if not isinstance(doubled, int) or doubled % 2 or hidden != x.shape[1]:
        raise ProgramError(f"gate_up is {gate_up}, expected [E, 2I, {x.shape[1]}]")
    need_shape(down, (experts, hidden, doubled // 2), "down")
    if len(biases) == 1:
        raise ProgramError("gate_up_bias is given without down_bias")
    if len(biases) == 2:
        up_bias, down_bias = tensor(biases, 0), tensor(biases, 1)
        same_dtype(x, up_bias, down_bias)
        need_shape(up_bias, (experts, doubled), "gate_up_bias")
        need_shape(down_bias, (experts, hidden), "down_bias")
    if attrs["alpha"] != 1 and attrs["act"] != "silu":
        raise ProgramError(f"alpha is {attrs['alpha']}, which only silu supports")
    if isinstance(attrs["limit"], float) and not attrs["limit"] > 0:
        raise ProgramError(f"limit is {attrs['limit']}, expected above 0 or none")
    return (x,)


def expert_gate(
    gate_up: torch.Tensor, *, act: str, alpha: float, limit: float | None, shift: float
) -> torch.Tensor:
    """act(gate) * (up + shift) of `[.., 2I]` in at least float32, rounded once; gate first.

    With a limit the gate is cut above it, and up on both sides; silu is x * sigmoid(alpha * x).
    """
    gate, up = wide(gate_up).chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    turned = activate(gate, act) if alpha == 1 else gate * (alpha * gate).sigmoid()
    return (turned * (up + shift)).to(gate_up.dtype)


Product = Callable[["torch.Tensor", int], "torch.Tensor"]
"""Rows by one matrix of an expert."""


def _route(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    into: Product,
    out_of: Product,
    gate: Mapping[str, Any],
) -> torch.Tensor:
    """Each row through its experts' two products, summed over slots in order."""
    result = wide(x).new_zeros(x.shape)
    for slot in range(index.shape[1]):
        y = x.new_zeros(x.shape)
        for expert in index[:, slot].unique().tolist():
            rows = (index[:, slot] == expert).nonzero().flatten()
            y[rows] = out_of(expert_gate(into(x[rows], expert), **gate), expert)
        result = result + weight[:, slot, None].to(result.dtype) * wide(y)
    return result.to(x.dtype)


def _moe_meaning(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    **gate: Any,
) -> torch.Tensor:
    def product(matrix: torch.Tensor, bias: torch.Tensor | None) -> Product:
        return lambda rows, expert: linear_meaning(
            rows, matrix[expert], None if bias is None else bias[expert]
        )

    into, out_of = product(gate_up, gate_up_bias), product(down, down_bias)
    return _route(x, index, weight, into, out_of, gate)


def _scaled_moe_meaning(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor,
    down: torch.Tensor,
    down_scale: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    *,
    scheme: str,
    **gate: Any,
) -> torch.Tensor:
    dtype, how = from_torch(x.dtype).value, get_scheme(scheme).activations

    def product(matrix: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> Product:
        def run(rows: torch.Tensor, expert: int) -> torch.Tensor:
            own = None if bias is None else bias[expert]
            codes, scales = matrix[expert], scale[expert]
            if how is None:
                return decoded_linear_meaning(rows, codes, scales, own, dtype=dtype, scheme=scheme)
            return scaled_linear_meaning(
                *quantize_rows_meaning(rows, how.group, how.codes.name),
                *(codes, scales),
                own,
                dtype=dtype,
                scheme=scheme,
            )

        return run

    into = product(gate_up, gate_up_scale, gate_up_bias)
    out_of = product(down, down_scale, down_bias)
    return _route(x, index, weight, into, out_of, gate)


def _moe_cost(types: Types, outs: Outputs, attrs: Attrs, bindings: Mapping[str, int]) -> Cost:
    """Weights of the experts that at most T * K routes can touch; two products a route."""
    base = default_cost(types, outs, attrs, bindings)
    routes = tensor(types, 1).num_elements(bindings)
    places = (3, 5) if "scheme" in attrs else (3, 4)
    gate_up, down = (tensor(types, place) for place in places)
    experts = gate_up.shape[0]
    assert isinstance(experts, int)
    weights = gate_up.num_bytes() + down.num_bytes()
    idle = weights * max(experts - routes, 0) // max(experts, 1)
    doubled, hidden = gate_up.shape[1], down.shape[1]
    assert isinstance(doubled, int) and isinstance(hidden, int)
    each = doubled * hidden + hidden * (doubled // 2)
    return Cost(base.bytes_read - idle, base.bytes_written, 2 * routes * each)


_GATE = (
    AttrSpec("act", AttrKind.STR, choices=ACTIVATIONS),
    AttrSpec("alpha", AttrKind.FLOAT, 1.0),
    AttrSpec("limit", AttrKind.FLOAT, None, optional=True),
    AttrSpec("shift", AttrKind.FLOAT, 0.0),
)

OPS = (
    Op(
        "moe",
        Kind.EXPERTS,
        "x[T, H] through the experts index[T, K], weighted by weight[T, K] and summed over K in "
        "slot order in float32: gate_up[E, 2I, H] (gate first), act(gate) * (up + shift), "
        "down[E, H, I]. With a limit, the gate is clamped from above, and up on both sides; "
        "alpha is that of silu: x * sigmoid(alpha * x). Both products of an expert round as "
        "`linear` does, their rows too.",
        ("x", "index", "weight", "gate_up", "down", "gate_up_bias?", "down_bias?"),
        _moe,
        _moe_meaning,
        _GATE,
        cost_rule=_moe_cost,
    ),
    Op(
        "scaled_moe",
        Kind.EXPERTS,
        "`moe` over codes: rows of x, and of the activation once it is rounded to x's type, go "
        "through `quantize_rows`, and both products are `scaled_linear` with results of x's type; "
        "in a scheme whose activations stay as they are, both are `decoded_linear`.",
        (
            "x",
            "index",
            "weight",
            "gate_up",
            "gate_up_scale",
            "down",
            "down_scale",
            "gate_up_bias?",
            "down_bias?",
        ),
        _scaled_moe,
        _scaled_moe_meaning,
        (SCHEME, *_GATE),
        cost_rule=_moe_cost,
        code_depths=_code_depths,
    ),
)
