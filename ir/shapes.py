"""Arithmetic on symbolic shapes: text, sums, products, broadcasting and bindings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from .errors import ProgramError
from .types import Dim, DType, Sym, TensorType

DimLike = int | str | Sym
"""A dimension as an attribute may spell it: a size, a symbol, or text such as `"2*T+1"`."""

_DIM = re.compile(r"(?:(\d+)\*)?([A-Za-z_][A-Za-z0-9_]*)([+-]\d+)?")

Polynomial = dict[tuple[str, ...], int]
"""Coefficients by sorted symbol names: `{("T",): 2, (): 1}` is `2*T+1`."""


def parse_dim(text: DimLike) -> Dim:
    """The dimension that an attribute spells; ProgramError where it spells none."""
    if isinstance(text, Sym):
        return text
    if isinstance(text, int):
        if isinstance(text, bool) or text < 0:
            raise ProgramError(f"not a dimension: {text}")
        return text
    match = _DIM.fullmatch(text.replace(" ", ""))
    if match is None:
        raise ProgramError(f"not a dimension: {text!r}", hint='write a size, or like "2*T+1"')
    scale, name, offset = match.groups()
    if scale is not None and int(scale) < 1:
        raise ProgramError(f"a symbol's scale is at least 1: {text!r}")
    return Sym(name, int(scale or 1), int(offset or 0))


def parse_type(text: str) -> TensorType:
    """The type whose text this is, such as `f32[R, 576]`; ProgramError where it is of none."""
    dtype, bracket, rest = text.partition("[")
    inner = rest.removesuffix("]")
    parts = inner.split(", ") if inner else []
    try:
        dims = [int(part) if part.isdecimal() else parse_dim(part) for part in parts]
        kind = TensorType(DType(dtype), tuple(dims))
    except ValueError:
        kind = None
    if kind is None or not bracket or str(kind) != text:
        raise ProgramError(f"not a type: {text[:80]!r}", hint='write one like "f32[T, 64]"')
    return kind


def spell_dim(dim: Dim) -> int | str:
    """The form in which an attribute holds `dim`."""
    return dim if isinstance(dim, int) else str(dim)


def combine(terms: Mapping[str, int], offset: int) -> Dim | None:
    """The dimension `sum(scale * name) + offset`, or None where `Sym` cannot hold it."""
    kept = {name: scale for name, scale in terms.items() if scale}
    if not kept:
        return offset if offset >= 0 else None
    if len(kept) > 1:
        return None
    ((name, scale),) = kept.items()
    return Sym(name, scale, offset) if scale > 0 else None


def _linear(dim: Dim, sign: int = 1) -> tuple[dict[str, int], int]:
    if isinstance(dim, int):
        return {}, sign * dim
    return {dim.name: sign * dim.scale}, sign * dim.offset


def add_dims(a: Dim, b: Dim, sign: int = 1) -> Dim | None:
    """`a + sign * b`, or None where no dimension can hold it."""
    terms, offset = _linear(a)
    more, extra = _linear(b, sign)
    for name, scale in more.items():
        terms[name] = terms.get(name, 0) + scale
    return combine(terms, offset + extra)


def sum_dims(dims: Iterable[Dim]) -> Dim:
    """The sum of dimensions; ProgramError where it has more than one symbol."""
    total: Dim = 0
    for dim in dims:
        added = add_dims(total, dim)
        if added is None:
            raise ProgramError(f"cannot write the sum of {total} and {dim} as one dimension")
        total = added
    return total


def product(dims: Iterable[Dim]) -> Polynomial:
    """The number of elements of a shape, as a polynomial in its symbols."""
    result: Polynomial = {(): 1}
    for dim in dims:
        terms, offset = _linear(dim)
        factor: Polynomial = {(name,): scale for name, scale in terms.items()}
        if offset:
            factor[()] = offset
        grown: Polynomial = {}
        for left, a in result.items():
            for right, b in factor.items():
                key = tuple(sorted(left + right))
                grown[key] = grown.get(key, 0) + a * b
        result = {key: value for key, value in grown.items() if value}
    return result


def smallest(dim: Dim) -> int:
    """The least size `dim` can have where every symbol is at least 1."""
    return dim if isinstance(dim, int) else dim.scale + dim.offset


def broadcast(shapes: Sequence[Sequence[Dim]]) -> tuple[Dim, ...]:
    """The shape that numpy broadcasting gives; ProgramError where two do not fit."""
    rank = max((len(shape) for shape in shapes), default=0)
    result: list[Dim] = [1] * rank
    for shape in shapes:
        for i, dim in enumerate(shape, rank - len(shape)):
            if dim == 1 or dim == result[i]:
                continue
            if result[i] != 1:
                texts = " and ".join(spell_shape(s) for s in shapes)
                raise ProgramError(f"shapes {texts} do not broadcast: {result[i]} against {dim}")
            result[i] = dim
    return tuple(result)


def spell_shape(shape: Sequence[Dim]) -> str:
    """A shape as text, e.g. `[T, 64]`."""
    return f"[{', '.join(str(dim) for dim in shape)}]"


def bind_shape(declared: TensorType, actual: Sequence[int], bindings: dict[str, int]) -> str | None:
    """Solve the symbols of `declared` against a real shape into `bindings`.

    Returns None, or what does not fit. A symbol already bound must have the same value.
    """
    if len(declared.shape) != len(actual):
        return f"has shape {list(actual)}, declared {declared}"
    for dim, size in zip(declared.shape, actual, strict=True):
        if isinstance(dim, int):
            if dim != size:
                return f"has shape {list(actual)}, declared {declared}"
            continue
        value, rest = divmod(size - dim.offset, dim.scale)
        if rest or value < 0:
            return f"has size {size} where {dim} was declared"
        if bindings.setdefault(dim.name, value) != value:
            return f"has {dim} = {size}, but {dim.name} is {bindings[dim.name]}"
    return None
