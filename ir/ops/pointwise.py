"""Elementwise ops: one result element from the operands' elements at its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import ProgramError
from ..shapes import broadcast
from ..torch_types import to_torch
from ..types import DType, TensorType
from .base import AttrKind, Attrs, AttrSpec, Kind, Meaning, Op, Outputs, Types, need_float, tensor

if TYPE_CHECKING:
    import torch

Scalar = bool | int | float


def join_dtype(types: Types) -> DType:
    """The element type of operands that must agree; scalars follow their tensor neighbours.

    A literal fits where its value can be held without changing kind: no float among integers, no
    number among booleans. A 0-d tensor of the same kind (float, integer) follows like a literal.
    """
    found = [t for t in types if isinstance(t, TensorType)]
    if not found:
        raise ProgramError("all operands are literals; fold them")
    ranked = [t for t in found if t.shape] or found
    dtype = ranked[0].dtype
    for kind in found:
        scalar = not kind.shape and ranked[0].shape and kind.dtype.is_float and dtype.is_float
        if kind.dtype is not dtype and not scalar:
            raise ProgramError(f"mixed element types: {', '.join(map(str, found))}")
    for value in types:
        if not isinstance(value, TensorType) and not _fits(value, dtype):
            raise ProgramError(f"the literal {value!r} does not fit among {dtype.value} operands")
    return dtype


def _fits(value: Scalar, dtype: DType) -> bool:
    if isinstance(value, bool):
        return dtype is DType.BOOL
    if isinstance(value, int):
        return dtype is not DType.BOOL
    return dtype.is_float


def _shape(types: Types) -> Outputs:
    kinds = [t for t in types if isinstance(t, TensorType)]
    return (TensorType(kinds[0].dtype, broadcast([t.shape for t in kinds])),)


def _same(types: Types, dtype: DType) -> Outputs:
    return (TensorType(dtype, _shape(types)[0].shape),)


def _floats(types: Types, attrs: Attrs) -> Outputs:
    dtype = join_dtype(types)
    if not dtype.is_float:
        raise ProgramError(f"operands are {dtype.value}, expected floating point")
    return _same(types, dtype)


def _numbers(types: Types, attrs: Attrs) -> Outputs:
    dtype = join_dtype(types)
    if dtype is DType.BOOL:
        raise ProgramError("operands are bool, expected numbers", hint="cast them first")
    return _same(types, dtype)


def _booleans(types: Types, attrs: Attrs) -> Outputs:
    dtype = join_dtype(types)
    if dtype is not DType.BOOL:
        raise ProgramError(f"operands are {dtype.value}, expected bool")
    return _same(types, dtype)


def _ordering(types: Types, attrs: Attrs) -> Outputs:
    join_dtype(types)
    return _same(types, DType.BOOL)


def _cast(types: Types, attrs: Attrs) -> Outputs:
    return (TensorType(DType(attrs["dtype"]), tensor(types, 0).shape),)


def _clamp(types: Types, attrs: Attrs) -> Outputs:
    if attrs["min"] is None and attrs["max"] is None:
        raise ProgramError("neither min nor max is given")
    kind = need_float(tensor(types, 0))
    return (kind,)


def _where(types: Types, attrs: Attrs) -> Outputs:
    condition = tensor(types, 0)
    if condition.dtype is not DType.BOOL:
        raise ProgramError(f"the condition is {condition}, expected bool")
    dtype = join_dtype(types[1:])
    return _same(types, dtype)


def _torch(name: str) -> Meaning:
    """The torch function of that name, looked up when it is first needed."""

    def meaning(*inputs: torch.Tensor) -> torch.Tensor:
        import torch

        result = getattr(torch, name)(*inputs)
        assert isinstance(result, torch.Tensor)
        return result

    return meaning


def _torch_of_tensors(name: str) -> Meaning:
    """As `_torch`, for functions that take tensors alone: a literal becomes a 0-d one."""

    def meaning(a: torch.Tensor | Scalar, b: torch.Tensor | Scalar) -> torch.Tensor:
        import torch

        like = a if isinstance(a, torch.Tensor) else b
        assert isinstance(like, torch.Tensor)
        pair = [
            torch.as_tensor(v, dtype=like.dtype, device=like.device)
            if not isinstance(v, torch.Tensor)
            else v
            for v in (a, b)
        ]
        result = getattr(torch, name)(*pair)
        assert isinstance(result, torch.Tensor)
        return result

    return meaning


def _functional(name: str) -> Meaning:
    def meaning(x: torch.Tensor) -> torch.Tensor:
        import torch.nn.functional

        result = getattr(torch.nn.functional, name)(x)
        assert isinstance(result, torch.Tensor)
        return result

    return meaning


def _gelu_meaning(x: torch.Tensor, *, approximate: str) -> torch.Tensor:
    import torch.nn.functional

    return torch.nn.functional.gelu(x, approximate=approximate)


def _clamp_meaning(x: torch.Tensor, *, min: float | None, max: float | None) -> torch.Tensor:
    return x.clamp(min, max)


def _cast_meaning(x: torch.Tensor, *, dtype: str) -> torch.Tensor:
    return x.to(to_torch(dtype))


def _where_meaning(
    condition: torch.Tensor, a: torch.Tensor | Scalar, b: torch.Tensor | Scalar
) -> torch.Tensor:
    import torch

    ranked = [v for v in (a, b) if isinstance(v, torch.Tensor)]
    like = max(ranked, key=lambda v: v.dim())
    first, second = (torch.as_tensor(v, dtype=like.dtype, device=like.device) for v in (a, b))
    return torch.where(condition, first, second)


def _arith(name: str) -> Meaning:
    """Tensor arithmetic where a scalar may stand on either side."""

    def meaning(a: torch.Tensor | Scalar, b: torch.Tensor | Scalar) -> torch.Tensor:
        import operator

        import torch

        result = getattr(operator, name)(a, b)
        assert isinstance(result, torch.Tensor)
        return result

    return meaning


Rule = Callable[[Types, Attrs], Outputs]


def _unary(name: str, rule: Rule, meaning: Meaning, text: str) -> Op:
    return Op(name, Kind.POINTWISE, f"{text} of each element.", ("x",), rule, meaning)


def _binary(name: str, rule: Rule, meaning: Meaning, text: str) -> Op:
    doc = f"{text}, with numpy broadcasting; one of the two may be a literal."
    return Op(name, Kind.POINTWISE, doc, ("a", "b"), rule, meaning)


_UNARY = (
    _unary("neg", _numbers, _torch("neg"), "The negative"),
    _unary("abs", _numbers, _torch("abs"), "The magnitude"),
    _unary("exp", _floats, _torch("exp"), "e to the power"),
    _unary("log", _floats, _torch("log"), "The natural logarithm"),
    _unary("sqrt", _floats, _torch("sqrt"), "The square root"),
    _unary("rsqrt", _floats, _torch("rsqrt"), "One over the square root"),
    _unary("reciprocal", _floats, _torch("reciprocal"), "One over the value"),
    _unary("sin", _floats, _torch("sin"), "The sine"),
    _unary("cos", _floats, _torch("cos"), "The cosine"),
    _unary("tanh", _floats, _torch("tanh"), "The hyperbolic tangent"),
    _unary("sigmoid", _floats, _torch("sigmoid"), "1 / (1 + exp(-x))"),
    _unary("relu", _numbers, _torch("relu"), "max(x, 0)"),
    _unary("silu", _floats, _functional("silu"), "x * sigmoid(x)"),
    _unary("erf", _floats, _torch("erf"), "The error function"),
    _unary("softplus", _floats, _functional("softplus"), "log(1 + exp(x))"),
    _unary("floor", _floats, _torch("floor"), "The next integer downwards"),
    _unary("logical_not", _booleans, _torch("logical_not"), "The negation"),
)

_BINARY = (
    _binary("add", _numbers, _arith("add"), "a + b"),
    _binary("sub", _numbers, _arith("sub"), "a - b"),
    _binary("mul", _numbers, _arith("mul"), "a * b"),
    _binary("div", _floats, _arith("truediv"), "a / b"),
    _binary("pow", _floats, _arith("pow"), "a to the power b"),
    _binary("maximum", _numbers, _torch_of_tensors("maximum"), "The larger of a and b"),
    _binary("minimum", _numbers, _torch_of_tensors("minimum"), "The smaller of a and b"),
    _binary("eq", _ordering, _arith("eq"), "Whether a = b, as bool"),
    _binary("ne", _ordering, _arith("ne"), "Whether a ≠ b, as bool"),
    _binary("lt", _ordering, _arith("lt"), "Whether a < b, as bool"),
    _binary("le", _ordering, _arith("le"), "Whether a ≤ b, as bool"),
    _binary("gt", _ordering, _arith("gt"), "Whether a > b, as bool"),
    _binary("ge", _ordering, _arith("ge"), "Whether a ≥ b, as bool"),
    _binary("logical_and", _booleans, _torch_of_tensors("logical_and"), "Both"),
    _binary("logical_or", _booleans, _torch_of_tensors("logical_or"), "Either"),
)

_BOUND = AttrKind.FLOAT

OPS = (
    *_UNARY,
    Op(
        "gelu",
        Kind.POINTWISE,
        "x * Phi(x); `approximate` is `none` (erf) or `tanh`.",
        ("x",),
        _floats,
        _gelu_meaning,
        (AttrSpec("approximate", AttrKind.STR, "none", ("none", "tanh")),),
    ),
    Op(
        "clamp",
        Kind.POINTWISE,
        "x limited to `min` .. `max`; None leaves a side open.",
        ("x",),
        _clamp,
        _clamp_meaning,
        (
            AttrSpec("min", _BOUND, None, optional=True),
            AttrSpec("max", _BOUND, None, optional=True),
        ),
    ),
    Op(
        "cast",
        Kind.POINTWISE,
        "x in another element type, rounded to nearest even.",
        ("x",),
        _cast,
        _cast_meaning,
        (AttrSpec("dtype", AttrKind.DTYPE),),
    ),
    *_BINARY,
    Op(
        "where",
        Kind.POINTWISE,
        "a where the condition holds, else b, with numpy broadcasting.",
        ("condition", "a", "b"),
        _where,
        _where_meaning,
    ),
)
