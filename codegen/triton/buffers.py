"""Buffers: where a value lies and how it is strided, so that views launch nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ...ir.errors import ProgramError
from ...ir.launches import Pointer
from ...ir.types import Dim, DType, Sym

Stride = Dim
"""Elements between neighbours along a dimension."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """A strided tensor behind a pointer; `offset` counts elements from there."""

    home: Pointer
    dtype: DType
    shape: tuple[Dim, ...]
    strides: tuple[Stride, ...]
    offset: int = 0

    @classmethod
    def dense(cls, home: Pointer, dtype: DType, shape: tuple[Dim, ...]) -> Buffer:
        """A row-major tensor at a pointer."""
        return cls(home, dtype, shape, dense_strides(shape))

    @property
    def is_dense(self) -> bool:
        """Row-major without gaps (dimensions of size 1 may have any stride)."""
        expected = dense_strides(self.shape)
        return all(
            size == 1 or a == b
            for size, a, b in zip(self.shape, self.strides, expected, strict=True)
        )

    @property
    def pointer(self) -> Pointer:
        """The address of the first element."""
        return replace(self.home, offset=self.home.offset + self.offset * self.dtype.size_bytes)

    def transpose(self, perm: tuple[int, ...]) -> Buffer:
        """Dimensions in another order."""
        return replace(
            self,
            shape=tuple(self.shape[i] for i in perm),
            strides=tuple(self.strides[i] for i in perm),
        )

    def slice(self, dim: int, start: int, step: int, shape: tuple[Dim, ...]) -> Buffer | None:
        """A range of one dimension; None where its start depends on a symbol."""
        stride = self.strides[dim]
        if not isinstance(stride, int):
            return replace(self, shape=shape) if start == 0 and step == 1 else None
        strides = (*self.strides[:dim], stride * step, *self.strides[dim + 1 :])
        return replace(self, shape=shape, strides=strides, offset=self.offset + start * stride)

    def expand(self, shape: tuple[Dim, ...]) -> Buffer:
        """Broadcast to `shape` with strides of 0."""
        missing = len(shape) - len(self.shape)
        strides: list[Stride] = [0] * missing
        for size, stride, wanted in zip(self.shape, self.strides, shape[missing:], strict=True):
            strides.append(0 if size == 1 and wanted != 1 else stride)
        return replace(self, shape=shape, strides=tuple(strides))

    def reshape(self, shape: tuple[Dim, ...]) -> Buffer | None:
        """The same elements under another shape; None where strides cannot say it."""
        if self.is_dense:
            return replace(self, shape=shape, strides=dense_strides(shape))
        strides = _reshape_strides(self.shape, self.strides, shape)
        return None if strides is None else replace(self, shape=shape, strides=strides)


def times(a: Dim, b: Dim) -> Dim:
    """The product of two sizes, of which one at most depends on a symbol."""
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    if isinstance(a, int):
        a, b = b, a
    if not isinstance(a, Sym) or not isinstance(b, int):
        raise ProgramError(f"the product of the sizes {a} and {b} is not supported")
    return 0 if b == 0 else Sym(a.name, a.scale * b, a.offset * b)


def product(shape: tuple[Dim, ...]) -> Dim:
    """The number of elements of a shape."""
    count: Dim = 1
    for dim in shape:
        count = times(count, dim)
    return count


def dense_strides(shape: tuple[Dim, ...]) -> tuple[Stride, ...]:
    """Row-major strides of a shape."""
    strides: list[Stride] = []
    factor: Dim = 1
    for dim in reversed(shape):
        strides.append(factor)
        if len(strides) < len(shape):
            factor = times(factor, dim)
    return tuple(reversed(strides))


def _reshape_strides(
    shape: tuple[Dim, ...], strides: tuple[Stride, ...], target: tuple[Dim, ...]
) -> tuple[Stride, ...] | None:
    """Match runs of source dimensions to runs of target dimensions of the same product."""
    source = [(d, s) for d, s in zip(shape, strides, strict=True) if d != 1]
    result: list[Stride] = []
    targets = list(target)
    while targets:
        dim = targets.pop(0)
        if dim == 1:
            result.append(1)
            continue
        if not source:
            return None
        size, stride = source.pop(0)
        if size == dim:
            result.append(stride)
            continue
        sizes = _match(size, dim, source, targets, stride)
        if sizes is None:
            return None
        stride, parts = sizes
        result.extend(stride * math.prod(parts[i + 1 :]) for i in range(len(parts)))
    return None if source else tuple(result)


def _match(
    size: Dim, dim: Dim, source: list[tuple[Dim, Stride]], targets: list[Dim], stride: Stride
) -> tuple[int, list[int]] | None:
    """Take source and target dimensions from the lists until their products agree."""
    if not isinstance(size, int) or not isinstance(dim, int) or not isinstance(stride, int):
        return None
    have, parts = size, [dim]
    while have != math.prod(parts):
        if have < math.prod(parts):
            following = source.pop(0) if source else (None, None)
            inner, inner_stride = following
            if not isinstance(inner, int) or not isinstance(inner_stride, int):
                return None
            if stride != inner * inner_stride:
                return None
            have, stride = have * inner, inner_stride
        else:
            part = targets.pop(0) if targets else None
            if not isinstance(part, int):
                return None
            parts.append(part)
    return stride, parts
