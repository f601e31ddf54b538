"""The library's conversions (stack, concatenate, split, transpose) as weight expressions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Split,
    Transpose,
    WeightConverter,
)

from ..ir.errors import ProgramError, UnsupportedModelError
from ..ir.program import WeightExpr
from ..ir.types import TensorType
from ..ir.weights import infer_weight

Parts = dict[str, list[WeightExpr]]
ShapeOf = Callable[[str], tuple[int, ...]]


def apply_conversion(
    converter: WeightConverter,
    target: str,
    parts: Mapping[str, list[WeightExpr]],
    shape_of: ShapeOf,
) -> dict[str, WeightExpr]:
    """Expressions by parameter name for one use of a converter.

    `parts` are the published tensors by source pattern, in natural order of their names;
    `target` is the name of the converter's first target. Raises UnsupportedModelError for an
    operation without a lazy form.
    """
    current: Parts = {pattern: list(exprs) for pattern, exprs in parts.items()}
    for operation in converter.operations:
        current = _apply(operation, converter, target, current, shape_of)
    first = converter.target_patterns[0]
    made: dict[str, WeightExpr] = {}
    for pattern, exprs in current.items():
        if len(exprs) != 1:
            raise UnsupportedModelError(f"{len(exprs)} tensors are left for one", where=target)
        made[target if pattern == first else target.replace(first, pattern)] = exprs[0]
    return made


def _apply(
    operation: Any, converter: WeightConverter, target: str, parts: Parts, shape_of: ShapeOf
) -> Parts:
    targets = list(converter.target_patterns)
    if isinstance(operation, MergeModulelist):
        merged = {
            pattern: [WeightExpr("stack", tuple(exprs), {"dim": operation.dim})]
            for pattern, exprs in parts.items()
        }
        return {targets[0]: next(iter(merged.values()))} if len(merged) == 1 else merged
    if isinstance(operation, Concatenate):
        # In the order of the patterns, whatever order the file has.
        listed = [expr for pattern in converter.source_patterns for expr in parts.get(pattern, [])]
        return {targets[0]: [WeightExpr("concat", tuple(listed), {"dim": operation.dim})]}
    expr = _only(parts, operation, target)
    if isinstance(operation, Transpose):
        return {targets[0]: [_transpose(operation, expr, target, shape_of)]}
    if isinstance(operation, Split) or (
        isinstance(operation, Chunk) and operation.num_shards_attribute is None
    ):
        return _split(operation, expr, targets, target, shape_of)
    raise UnsupportedModelError(
        f"the checkpoint needs the conversion {operation}, which is not supported", where=target
    )


def _only(parts: Parts, operation: Any, target: str) -> WeightExpr:
    exprs = [expr for each in parts.values() for expr in each]
    if len(exprs) != 1:
        raise UnsupportedModelError(
            f"the conversion {operation} is given {len(exprs)} tensors", where=target
        )
    return exprs[0]


def _type(expr: WeightExpr, target: str) -> TensorType:
    kind = infer_weight(expr)
    if kind is None:
        raise ProgramError(f"the type of {target} is not known")
    return kind


def _transpose(
    operation: Transpose, expr: WeightExpr, target: str, shape_of: ShapeOf
) -> WeightExpr:
    kind = _type(expr, target)
    if operation.check_dims and kind.shape == shape_of(target):
        return expr
    perm = list(range(kind.rank))
    a, b = operation.dim0 % kind.rank, operation.dim1 % kind.rank
    perm[a], perm[b] = perm[b], perm[a]
    return WeightExpr("transpose", (expr,), {"perm": tuple(perm)})


def _split(
    operation: Split | Chunk,
    expr: WeightExpr,
    targets: list[str],
    target: str,
    shape_of: ShapeOf,
) -> Parts:
    """One slice a target, as large as its parameter."""
    kind = _type(expr, target)
    dim = operation.dim % kind.rank
    result: Parts = {}
    start = 0
    for pattern in targets:
        stop = start + shape_of(target.replace(targets[0], pattern))[dim]
        attrs = {"dim": dim, "start": start, "stop": stop}
        result[pattern] = [WeightExpr("slice", (expr,), attrs)]
        start = stop
    if start != kind.shape[dim]:
        raise UnsupportedModelError(f"{kind} is not as long as its parts", where=target)
    return result
