"""The tensors of a GGUF file as parameters of a transformers model: names, order of rows, norms.

Rows change places and matrices are stacked, but a row stays whole, and with it the blocks of a
quantized one: that is what later lets packed blocks be kept. (Experts that a model multiplies from
the left are transposed, rows and all.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from ....ir.errors import CheckpointError
from ....ir.program import WeightExpr
from ....ir.weights import checkpoint
from .architectures import LAYER_NUMBER, TOP, Architecture
from .ropes import ROPE_TENSORS
from .tensors import GgufTensors

_LAYER: Final = re.compile(rf"blk\.({LAYER_NUMBER})\.(.+)\.(weight|bias)")
_EXPERTS: Final = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_PAIRED: Final = {"attn_q": True, "attn_k": False}
"""Tensors whose rows are turned by rope: true for those of query heads."""


def parameter_expressions(
    architecture: Architecture, tensors: GgufTensors, num_heads: int, num_kv_heads: int
) -> dict[str, WeightExpr]:
    """How each parameter of the model is made of the file's tensors, by the parameter's name.

    Raises CheckpointError, naming the tensor, for one that the model does not have, or that does
    not fit its part of it.
    """
    found: dict[str, WeightExpr] = {}
    experts: dict[str, dict[str, WeightExpr]] = {}
    for name in sorted(tensors.types.keys() - set(ROPE_TENSORS)):
        leaf = checkpoint(name, tensors.types[name], tensors.stored(name))
        match = _LAYER.fullmatch(name)
        if match is None:
            found[_top(name, tensors)] = _shifted(leaf, "norm" in name, architecture)
            continue
        layer, stem, suffix = match.groups()
        if architecture.experts is not None and stem in _EXPERTS:
            experts.setdefault(f"model.layers.{layer}.mlp.experts", {})[f"{stem}.{suffix}"] = leaf
        elif stem not in architecture.layer:
            raise _unknown(name, tensors)
        else:
            parameter = f"model.layers.{layer}.{architecture.layer[stem]}.{suffix}"
            heads = num_heads if _PAIRED.get(stem) else num_kv_heads
            paired = architecture.pairs and stem in _PAIRED
            expr = _halved(leaf, heads, tensors) if paired else leaf
            expr = _shifted(expr, stem.endswith("norm"), architecture)
            found[parameter] = _fitted(expr, parameter)
    for place, parts in experts.items():
        found |= _experts(place, parts, architecture, tensors)
    return {
        name.removesuffix(".weight") if _is_bare(name) else name: e for name, e in found.items()
    }


def _top(name: str, tensors: GgufTensors) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem not in TOP or suffix not in ("weight", "bias"):
        raise _unknown(name, tensors)
    return f"{TOP[stem]}.{suffix}"


def _unknown(name: str, tensors: GgufTensors) -> CheckpointError:
    return CheckpointError(
        "is a tensor that models of this architecture do not have",
        where=f"{tensors.path}: tensor {name}",
    )


def _is_bare(parameter: str) -> bool:
    """Parameters that are no module's weight."""
    return parameter.endswith(".sinks.weight")


def _halved(leaf: WeightExpr, heads: int, tensors: GgufTensors) -> WeightExpr:
    """Rows in pairs, as a rope of neighbours reads them, in two halves of each head."""
    shape = _shape(leaf)
    if shape[0] % (2 * heads):
        raise CheckpointError(
            f"has {shape[0]} rows, expected a multiple of {2 * heads} for {heads} heads",
            where=f"{tensors.path}: tensor {leaf.attrs['name']}",
        )
    rest = shape[1:]
    pairs = (heads, shape[0] // heads // 2, 2, *rest)
    split = WeightExpr("reshape", (leaf,), {"shape": pairs})
    turned = WeightExpr("transpose", (split,), {"perm": (0, 2, 1, *range(3, 3 + len(rest)))})
    return WeightExpr("reshape", (turned,), {"shape": shape})


def _shifted(expr: WeightExpr, is_norm: bool, architecture: Architecture) -> WeightExpr:
    if not is_norm or not architecture.norm_shift:
        return expr
    return WeightExpr("add", (expr,), {"value": -architecture.norm_shift})


def _fitted(expr: WeightExpr, parameter: str) -> WeightExpr:
    """A vector as the matrix of one row that the model has."""
    if not parameter.endswith("shared_expert_gate.weight") or len(_shape(expr)) != 1:
        return expr
    return WeightExpr("reshape", (expr,), {"shape": (1, *_shape(expr))})


def _experts(
    place: str,
    parts: Mapping[str, WeightExpr],
    architecture: Architecture,
    tensors: GgufTensors,
) -> dict[str, WeightExpr]:
    """The parameters of a layer's routed experts: gate and up are one, down is another."""
    found: dict[str, WeightExpr] = {}
    for suffix, ending in (("weight", ""), ("bias", "_bias")):
        three = [parts.get(f"{stem}.{suffix}") for stem in _EXPERTS]
        if suffix == "bias" and three == [None, None, None]:
            continue
        gate, up, down = three
        if gate is None or up is None or down is None or _shape(gate) != _shape(up):
            layer = place.split(".")[2]
            raise CheckpointError(
                f"gate, up and down of its experts ({suffix}) are not complete, or differ in shape",
                where=f"{tensors.path}: blk.{layer}",
            )
        if architecture.experts == "split":
            found[f"{place}.gate_up_proj{ending}"] = WeightExpr("concat", (gate, up), {"dim": 1})
            found[f"{place}.down_proj{ending}"] = down
        else:
            both = _interleaved(gate, up)
            is_weight = suffix == "weight"
            found[f"{place}.gate_up_proj{ending}"] = _swapped(both) if is_weight else both
            found[f"{place}.down_proj{ending}"] = _swapped(down) if is_weight else down
    return found


def _interleaved(gate: WeightExpr, up: WeightExpr) -> WeightExpr:
    """Rows of gate and up in turn: `[experts, 2 * width, ...]`."""
    experts, width, *rest = _shape(gate)
    stacked = WeightExpr("stack", (gate, up), {"dim": 2})
    return WeightExpr("reshape", (stacked,), {"shape": (experts, 2 * width, *rest)})


def _swapped(expr: WeightExpr) -> WeightExpr:
    return WeightExpr("transpose", (expr,), {"perm": (0, 2, 1)})


def _shape(expr: WeightExpr) -> tuple[int, ...]:
    from ....ir.weights import infer_weight

    kind = infer_weight(expr)
    assert kind is not None
    return tuple(int(str(size)) for size in kind.shape)
