"""Ops that rearrange elements and compute nothing: reshape, transpose, expand, slice, concat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..cost import Cost
from ..errors import ProgramError
from ..program import Attr
from ..shapes import (
    add_dims,
    broadcast,
    parse_dim,
    product,
    smallest,
    spell_dim,
    spell_shape,
    sum_dims,
)
from ..types import Dim, Sym, TensorType
from .base import (
    AttrKind,
    Attrs,
    AttrSpec,
    Kind,
    Op,
    Outputs,
    Types,
    axes_attr,
    dims_attr,
    int_attr,
    is_token_dim,
    same_dtype,
    tensor,
    tensors,
)

if TYPE_CHECKING:
    import torch

_NO_END = 1 << 31
"""A stop this large says "to the end", as exported slices do."""


def _reshape(types: Types, attrs: Attrs) -> Outputs:
    kind, shape = tensor(types, 0), dims_attr(attrs, "shape")
    if product(kind.shape) != product(shape):
        raise ProgramError(f"cannot reshape {kind} to {spell_shape(shape)}")
    return (TensorType(kind.dtype, shape),)


def _reshape_mixes(types: Types, outs: Outputs, attrs: Attrs, token: str) -> str | None:
    """A token's elements stay together where as many rows stand before it as did."""
    before, after = (_rows_before(kind.shape, token) for kind in (tensor(types, 0), outs[0]))
    if before == after:
        return None
    return f"reshapes {tensor(types, 0)} to {outs[0]} across the token dimension"


def _rows_before(shape: tuple[Dim, ...], token: str) -> object:
    for i, dim in enumerate(shape):
        if is_token_dim(dim, token):
            return product(shape[:i])
    return None


def _reshape_meaning(x: torch.Tensor, *, shape: tuple[int, ...]) -> torch.Tensor:
    return x.reshape(shape)


def _transpose(types: Types, attrs: Attrs) -> Outputs:
    kind, perm = tensor(types, 0), axes_attr(attrs, "perm")
    if len(perm) != kind.rank:
        raise ProgramError(f"perm {perm} does not permute {kind}")
    return (TensorType(kind.dtype, tuple(kind.shape[i] for i in perm)),)


def _transpose_meaning(x: torch.Tensor, *, perm: tuple[int, ...]) -> torch.Tensor:
    return x.permute(perm)


def _expand(types: Types, attrs: Attrs) -> Outputs:
    kind, shape = tensor(types, 0), dims_attr(attrs, "shape")
    if broadcast([kind.shape, shape]) != shape:
        raise ProgramError(f"cannot expand {kind} to {spell_shape(shape)}")
    return (TensorType(kind.dtype, shape),)


def _expand_meaning(x: torch.Tensor, *, shape: tuple[int, ...]) -> torch.Tensor:
    return x.expand(shape)


def _edge(value: Attr, default: Dim, size: Dim) -> Dim:
    """A slice's start or stop as a dimension between 0 and `size`."""
    if value is None or (isinstance(value, int) and value >= _NO_END):
        return default
    edge = value if isinstance(value, int) else parse_dim(str(value))
    if isinstance(edge, int) and edge < 0:
        if isinstance(size, int):
            return max(size + edge, 0)
        return Sym(size.name, size.scale, size.offset + edge)
    if isinstance(edge, int) and isinstance(size, int):
        return min(edge, size)
    if edge == size:
        return edge
    rest = add_dims(size, edge, -1)
    if rest is None or smallest(rest) < 0:
        raise ProgramError(f"{edge} may lie past the end of a dimension of size {size}")
    return edge


def _slice_canonical(types: Types, attrs: dict[str, Attr]) -> dict[str, Attr]:
    kind = tensor(types, 0)
    size = kind.shape[int_attr(attrs, "dim")]
    start, stop = _edge(attrs["start"], 0, size), _edge(attrs["stop"], size, size)
    return attrs | {"start": spell_dim(start), "stop": spell_dim(stop)}


def _slice(types: Types, attrs: Attrs) -> Outputs:
    kind, dim, step = tensor(types, 0), int_attr(attrs, "dim"), int_attr(attrs, "step")
    if step < 1:
        raise ProgramError(f"step is {step}, expected at least 1")
    start, stop = attrs["start"], attrs["stop"]
    assert isinstance(start, (int, str))
    assert isinstance(stop, (int, str))
    length = add_dims(parse_dim(stop), parse_dim(start), -1)
    if length is None:
        length = 0
    if isinstance(length, int):
        length = (max(length, 0) + step - 1) // step
    elif step != 1:
        if length.scale % step or length.offset % step:
            raise ProgramError(f"cannot write {length} elements by steps of {step}")
        length = Sym(length.name, length.scale // step, length.offset // step)
    return (TensorType(kind.dtype, (*kind.shape[:dim], length, *kind.shape[dim + 1 :])),)


def _slice_mixes(types: Types, outs: Outputs, attrs: Attrs, token: str) -> str | None:
    dim = int_attr(attrs, "dim")
    size = tensor(types, 0).shape[dim]
    if not is_token_dim(size, token) or outs[0].shape[dim] == size:
        return None
    return "takes a part of the tokens"


def _slice_meaning(x: torch.Tensor, *, dim: int, start: int, stop: int, step: int) -> torch.Tensor:
    index = (slice(None),) * dim + (slice(start, stop, step),)
    return x[index]


def _concat(types: Types, attrs: Attrs) -> Outputs:
    kinds = [tensor(types, i) for i in range(len(types))]
    dim = int_attr(attrs, "dim")
    dtype = same_dtype(*kinds)
    first = kinds[0]
    for kind in kinds[1:]:
        rest = (*kind.shape[:dim], *kind.shape[dim + 1 :])
        if kind.rank != first.rank or rest != (*first.shape[:dim], *first.shape[dim + 1 :]):
            raise ProgramError(f"{first} and {kind} differ outside dimension {dim}")
    total = sum_dims(kind.shape[dim] for kind in kinds)
    return (TensorType(dtype, (*first.shape[:dim], total, *first.shape[dim + 1 :])),)


def _concat_mixes(types: Types, outs: Outputs, attrs: Attrs, token: str) -> str | None:
    dim = int_attr(attrs, "dim")
    if any(is_token_dim(kind.shape[dim], token) for kind in tensors(types)):
        return "joins along the token dimension" if len(types) > 1 else None
    return None


def _concat_meaning(*xs: torch.Tensor, dim: int) -> torch.Tensor:
    import torch

    return torch.cat(xs, dim)


def _view_cost(types: Types, outs: Outputs, attrs: Attrs, bindings: Mapping[str, int]) -> Cost:
    """Nothing: the same bytes, looked at in another way."""
    return Cost()


def _concat_cost(types: Types, outs: Outputs, attrs: Attrs, bindings: Mapping[str, int]) -> Cost:
    """Everything is copied; nothing is computed."""
    moved = outs[0].num_bytes(bindings)
    return Cost(moved, moved, 0)


_SHAPE = AttrSpec("shape", AttrKind.DIMS)
_DIM = AttrSpec("dim", AttrKind.AXIS)
_EDGE = AttrKind.OFFSET

OPS = (
    Op(
        "reshape",
        Kind.VIEW,
        "The same elements in row-major order in another shape.",
        ("x",),
        _reshape,
        _reshape_meaning,
        (_SHAPE,),
        cost_rule=_view_cost,
        mixes=_reshape_mixes,
    ),
    Op(
        "transpose",
        Kind.VIEW,
        "Dimensions in another order: result dimension i is x's dimension perm[i].",
        ("x",),
        _transpose,
        _transpose_meaning,
        (AttrSpec("perm", AttrKind.AXES),),
        cost_rule=_view_cost,
    ),
    Op(
        "expand",
        Kind.VIEW,
        "x repeated along dimensions of size 1 (and new leading ones) to `shape`.",
        ("x",),
        _expand,
        _expand_meaning,
        (_SHAPE,),
        cost_rule=_view_cost,
    ),
    Op(
        "slice",
        Kind.VIEW,
        "Elements start, start + step, ... below stop of one dimension. Negative edges count "
        "from the end and None is the end itself; both are stored as counts from the start.",
        ("x",),
        _slice,
        _slice_meaning,
        (
            _DIM,
            AttrSpec("start", _EDGE, 0, optional=True),
            AttrSpec("stop", _EDGE, None, optional=True),
            AttrSpec("step", AttrKind.INT, 1),
        ),
        cost_rule=_view_cost,
        mixes=_slice_mixes,
        canonical=_slice_canonical,
    ),
    Op(
        "concat",
        Kind.VIEW,
        "The operands one after the other along `dim`.",
        ("x*",),
        _concat,
        _concat_meaning,
        (_DIM,),
        cost_rule=_concat_cost,
        mixes=_concat_mixes,
    ),
)
