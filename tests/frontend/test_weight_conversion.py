"""Lazy conversions give what the library's own conversions give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
)

from infc.frontend.weight_conversion import apply_conversion
from infc.ir.errors import UnsupportedModelError
from infc.ir.program import WeightExpr
from infc.ir.types import DType, TensorType
from infc.ir.weights import checkpoint, evaluate_expr, infer_weight

Tensors = dict[str, torch.Tensor]


def leaf(name: str, tensor: torch.Tensor) -> WeightExpr:
    return checkpoint(name, TensorType(DType.F32, tuple(tensor.shape)))


def compare(
    converter: WeightConverter, target: str, parts: dict[str, list[tuple[str, torch.Tensor]]]
) -> None:
    """Our expressions, evaluated, against `converter.convert` on the same tensors."""
    tensors: Tensors = {name: tensor for listed in parts.values() for name, tensor in listed}
    for pattern, listed in parts.items():
        for name, tensor in listed:
            converter.add_tensor(target, name, pattern, lambda tensor=tensor: tensor)  # type: ignore[arg-type]
    expected: dict[str, Any] = converter.convert(target)
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    exprs = {pattern: [leaf(*pair) for pair in listed] for pattern, listed in parts.items()}
    made = apply_conversion(converter, target, exprs, shapes.__getitem__)
    assert made.keys() == expected.keys()
    for name, expr in made.items():
        got = evaluate_expr(expr, {"checkpoint": tensors.__getitem__})
        assert torch.equal(got, expected[name])
        kind = infer_weight(expr)
        assert kind is not None
        assert kind.shape == shapes[name]


SIZES = st.integers(1, 5)


@given(experts=SIZES, inner=SIZES, hidden=SIZES, swapped=st.booleans())
def test_experts_are_stacked_and_joined(
    experts: int, inner: int, hidden: int, swapped: bool
) -> None:
    """Gate first, whatever order the file lists the two in."""
    converter = WeightConverter(
        [".experts.*.w1.weight", ".experts.*.w3.weight"],
        ".experts.gate_up_proj",
        [MergeModulelist(dim=0), Concatenate(dim=1)],
    )
    kinds = ["w3", "w1"] if swapped else ["w1", "w3"]
    parts = {
        f".experts.*.{kind}.weight": [
            (f"l.experts.{i}.{kind}.weight", torch.randn(inner, hidden)) for i in range(experts)
        ]
        for kind in kinds
    }
    compare(converter, "l.experts.gate_up_proj", parts)


@given(experts=SIZES, rows=SIZES, columns=SIZES)
def test_one_list_is_stacked(experts: int, rows: int, columns: int) -> None:
    converter = WeightConverter(
        ".experts.*.w2.weight", ".experts.down_proj", [MergeModulelist(dim=0)]
    )
    listed = [(f"l.experts.{i}.w2.weight", torch.randn(rows, columns)) for i in range(experts)]
    compare(converter, "l.experts.down_proj", {".experts.*.w2.weight": listed})


@given(size=SIZES, columns=SIZES)
def test_chunks_go_to_their_parameters(size: int, columns: int) -> None:
    converter = WeightConverter("qkv", ["q_proj", "k_proj", "v_proj"], [Chunk(dim=0)])
    compare(
        converter, "l.q_proj.weight", {"qkv": [("l.qkv.weight", torch.randn(3 * size, columns))]}
    )


@given(rows=SIZES, columns=SIZES)
def test_transpose(rows: int, columns: int) -> None:
    converter = WeightConverter("c_attn", "attn", [Transpose(0, 1)])
    compare(
        converter, "l.attn.weight", {"c_attn": [("l.c_attn.weight", torch.randn(rows, columns))]}
    )


def test_what_has_no_lazy_form_is_refused() -> None:
    converter = WeightConverter("w13", "gate_up_proj", [Interleave(dim=0)])
    parts = {"w13": [leaf("l.w13", torch.zeros(4, 2))]}
    with pytest.raises(UnsupportedModelError, match="Interleave"):
        apply_conversion(converter, "l.gate_up_proj", parts, lambda name: (4, 2))
