"""Weights that are computed from others, for verification in float32."""

from __future__ import annotations

import pytest
import torch

from infc.ir.program import Attr, WeightExpr
from infc.ir.weights import compute_expr, evaluate_expr
from infc.passes.widened_weights import widened


@pytest.mark.parametrize("part", ["codes", "scales"])
def test_codes_of_a_computed_matrix_lie_beside_those_of_others(part: str) -> None:
    """Their type does not follow from that of the matrix, which is in float32 here."""
    tensors = {
        "a": torch.randn(3, 32).bfloat16(),
        "b": torch.randn(5, 32).bfloat16(),
        "factor": (2.0 ** torch.arange(-2, 3))[:, None].bfloat16(),
    }

    def leaf(name: str) -> WeightExpr:
        attrs: dict[str, Attr] = {
            "name": name,
            "dtype": "bf16",
            "shape": tuple(tensors[name].shape),
        }
        return WeightExpr("checkpoint", (), attrs)

    scaled = compute_expr("mul", (leaf("b"), leaf("factor")), {})
    parts = tuple(WeightExpr(part, (one,), {"scheme": "int4"}) for one in (leaf("a"), scaled))
    expr = WeightExpr("concat", parts, {"dim": 0})
    loaders = {"checkpoint": tensors.__getitem__}
    found, plain = (evaluate_expr(one, loaders) for one in (widened(expr), expr))
    assert found.dtype == plain.dtype
    assert torch.equal(found, plain)  # factors are powers of two
