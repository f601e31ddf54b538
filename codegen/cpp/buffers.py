"""Buffers: where a value lives and how it is strided, so that views cost nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ...ir.formats import Format
from ...ir.schemes import Scheme
from ...ir.types import Dim, DType, Sym
from .calls import ArenaPtr, InputPtr, Span, WeightPtr, c_dim

Stride = int | str
"""Elements between neighbours along a dimension; text where it depends on a symbol."""

CTYPES = {
    DType.F64: "double",
    DType.F32: "float",
    DType.BF16: "bf16",
    DType.I64: "int64_t",
    DType.I32: "int32_t",
    DType.I8: "int8_t",
    DType.U8: "uint8_t",
    DType.BOOL: "bool",
}
_CODES = {
    "i8": "int8_t",
    "i4_g32": "int4x2",
    "i8_g32": "Grouped<8, int8_t>",
    "i6_g32": "Grouped<6, int8_t>",
    "b4_g32": "Grouped<4, int8_t, absent, Levels::book>",
    "b4_g64": "Grouped<4, int8_t, absent, Levels::book, 2>",
    "b4_g128": "Grouped<4, int8_t, absent, Levels::book, 4>",
    "q8_0": "Grouped<8, half>",
    "q4_0": "Grouped<4, half>",
    "q4_1": "Grouped<4, half, half, Levels::counted>",
}
"""What the kernels call codes, by the name of their format."""


def has_kernels(form: Format) -> bool:
    """Whether there are kernels for codes of a format."""
    return form.name in _CODES


def codes_type(scheme: Scheme) -> str:
    """What the kernels call the codes of a scheme."""
    codes = _CODES[scheme.weight.name]
    return f"Decoded<{codes}>" if scheme.activations is None else codes


@dataclass(frozen=True, slots=True)
class Home:
    """The storage behind a buffer: the arena, a weight (by index), or an array of the step."""

    kind: str
    index: int = 0
    num_bytes: int = 0
    name: str = ""

    def span(self) -> Span:
        """What a call that touches this storage touches."""
        if self.kind == "arena":
            return Span("arena", self.index, self.index + self.num_bytes)
        return Span(f"{self.kind}:{self.name or self.index}")


@dataclass(frozen=True, slots=True)
class Buffer:
    """A strided tensor in some storage; `offset` counts elements from its start."""

    home: Home
    ctype: str
    shape: tuple[Dim, ...]
    strides: tuple[Stride, ...]
    offset: int = 0

    @classmethod
    def dense(cls, home: Home, ctype: str, shape: tuple[Dim, ...]) -> Buffer:
        """A row-major tensor that fills its storage."""
        return cls(home, ctype, shape, dense_strides(shape))

    @property
    def is_dense(self) -> bool:
        """Row-major without gaps (dimensions of size 1 may have any stride)."""
        expected = dense_strides(self.shape)
        return all(
            size == 1 or a == b
            for size, a, b in zip(self.shape, self.strides, expected, strict=True)
        )

    def pointer(self, element_bytes: int) -> ArenaPtr | WeightPtr | InputPtr:
        """The address of the first element, as an argument of a call."""
        match self.home.kind:
            case "arena":
                return ArenaPtr(self.ctype, self.home.index + self.offset * element_bytes)
            case "weight":
                return WeightPtr(self.ctype, self.home.index, self.offset * element_bytes)
        return InputPtr(self.ctype, self.home.name, str(self.offset))

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
        if isinstance(stride, str):
            if start != 0 or step != 1:
                return None
            return replace(self, shape=shape)
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


def dense_strides(shape: tuple[Dim, ...]) -> tuple[Stride, ...]:
    """Row-major strides of a shape."""
    strides: list[Stride] = []
    factor, symbols = 1, ""
    for dim in reversed(shape):
        strides.append(f"({symbols} * {factor})" if symbols else factor)
        if isinstance(dim, Sym):
            symbols = f"{symbols} * {c_dim(dim)}" if symbols else c_dim(dim)
        else:
            factor *= dim
    return tuple(reversed(strides))


def _reshape_strides(
    shape: tuple[Dim, ...], strides: tuple[Stride, ...], target: tuple[Dim, ...]
) -> tuple[Stride, ...] | None:
    """Match runs of source dimensions to runs of target dimensions of the same product."""
    source = [(d, s) for d, s in zip(shape, strides, strict=True) if d != 1]
    result: list[Stride] = []
    position = 0
    targets = list(target)
    while targets:
        dim = targets.pop(0)
        if dim == 1:
            result.append(1)
            continue
        if position == len(source):
            return None
        size, stride = source[position]
        position += 1
        if size == dim:
            result.append(stride)
            continue
        run = _match_run(source, position - 1, dim, targets)
        if run is None:
            return None
        taken, sizes, last = run
        position += taken - 1
        del targets[: len(sizes) - 1]
        result.extend(last * math.prod(sizes[i + 1 :]) for i in range(len(sizes)))
    return tuple(result) if position == len(source) else None


def _match_run(
    source: list[tuple[Dim, Stride]], start: int, first: Dim, rest: list[Dim]
) -> tuple[int, list[int], int] | None:
    """Source and target dimensions from here on until their products agree."""
    size, stride = source[start]
    if not isinstance(size, int) or not isinstance(first, int) or not isinstance(stride, int):
        return None
    taken, have, sizes = 1, size, [first]
    while have != math.prod(sizes):
        if have < math.prod(sizes):
            if start + taken == len(source):
                return None
            following, following_stride = source[start + taken]
            if not isinstance(following, int) or not isinstance(following_stride, int):
                return None
            if stride != following * following_stride:
                return None
            have, stride, taken = have * following, following_stride, taken + 1
        else:
            if len(sizes) > len(rest) or not isinstance(rest[len(sizes) - 1], int):
                return None
            following_target = rest[len(sizes) - 1]
            assert isinstance(following_target, int)
            sizes.append(following_target)
    return taken, sizes, stride
