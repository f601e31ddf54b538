"""Weights that are computed from others, without the rounding of 16-bit types."""

from __future__ import annotations

from dataclasses import replace

from ..ir.program import WeightExpr
from ..ir.quantized_pairs import PARTS
from ..ir.types import DType

WIDE = DType.F32.value


def widened(expr: WeightExpr) -> WeightExpr:
    """The expression with all that is computed from weights in float32, and what follows it.

    Verification runs nodes in float32: what a rewrite moves from nodes into weights must not begin
    to round there. Expressions that compute nothing come back as they are.
    """
    result, _ = _widened(expr)
    return result


def _widened(expr: WeightExpr) -> tuple[WeightExpr, bool]:
    """The expression, and whether it now is of another type than before."""
    parts = [_widened(part) for part in expr.inputs]
    if expr.op == "compute":
        inputs = tuple(part for part, _ in parts)
        return replace(expr, inputs=inputs, attrs={**expr.attrs, "wide": WIDE}), True
    if not any(is_wide for _, is_wide in parts):
        return expr, False
    if expr.op == "cast" and DType(expr.attrs["dtype"]).is_float:
        return parts[0]
    if expr.op in PARTS:  # of a type that does not follow from that of the matrix
        return replace(expr, inputs=tuple(part for part, _ in parts)), False
    inputs = tuple(part if is_wide else _cast(part) for part, is_wide in parts)
    return replace(expr, inputs=inputs), True


def without_factors(expr: WeightExpr) -> WeightExpr:
    """The expression without the scales of channels that `scale-channels` multiplies it by.

    What rounding loses is verified on random inputs, for which scales were not chosen: they would
    make it worse.
    """
    if expr.op == "compute" and expr.attrs["op"] == "mul" and len(expr.inputs) == 2:
        matrix, factor = expr.inputs
        if factor.op == "cast":
            (factor,) = factor.inputs
        if factor.op == "calibrated":
            return without_factors(matrix)
    return replace(expr, inputs=tuple(map(without_factors, expr.inputs)))


def _cast(expr: WeightExpr) -> WeightExpr:
    return WeightExpr("cast", (expr,), {"dtype": WIDE})
