"""The types of the IR: element types, symbolic dimensions and tensor types."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


class DType(enum.Enum):
    """Element types; the value is the spelling in IR text."""

    F32 = "f32"
    BF16 = "bf16"
    F16 = "f16"
    F64 = "f64"
    I64 = "i64"
    I32 = "i32"
    I8 = "i8"
    U8 = "u8"
    BOOL = "bool"

    @property
    def size_bytes(self) -> int:
        """Bytes of one element."""
        return _SIZES[self]

    @property
    def is_float(self) -> bool:
        """True for the floating-point types."""
        return self in (DType.F64, DType.F32, DType.BF16, DType.F16)


ELEMENT_TYPES: Final = frozenset(kind.value for kind in DType)
"""The spellings of all of them."""

_SIZES = {
    DType.F64: 8,
    DType.F32: 4,
    DType.BF16: 2,
    DType.F16: 2,
    DType.I64: 8,
    DType.I32: 4,
    DType.I8: 1,
    DType.U8: 1,
    DType.BOOL: 1,
}


@dataclass(frozen=True, slots=True)
class Sym:
    """A symbolic dimension `scale * name + offset`, with scale >= 1."""

    name: str
    scale: int = 1
    offset: int = 0

    def __str__(self) -> str:
        text = self.name if self.scale == 1 else f"{self.scale}*{self.name}"
        return text if self.offset == 0 else f"{text}{self.offset:+d}"

    def evaluate(self, bindings: Mapping[str, int]) -> int:
        """The dimension's size where each symbol has the bound value."""
        return self.scale * bindings[self.name] + self.offset


Dim = int | Sym
"""A dimension: a size, or a symbolic one."""


def evaluate_dim(dim: Dim, bindings: Mapping[str, int]) -> int:
    """The size of `dim` where each symbol has the bound value."""
    return dim if isinstance(dim, int) else dim.evaluate(bindings)


@dataclass(frozen=True, slots=True)
class SymbolRange:
    """The inclusive bounds of a symbol, e.g. `T: 1..4096`."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class TensorType:
    """Element type and shape of a dense row-major tensor."""

    dtype: DType
    shape: tuple[Dim, ...] = ()

    def __str__(self) -> str:
        return f"{self.dtype.value}[{', '.join(str(d) for d in self.shape)}]"

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def num_elements(self, bindings: Mapping[str, int] | None = None) -> int:
        """Number of elements where each symbol has the bound value."""
        count = 1
        for dim in self.shape:
            count *= evaluate_dim(dim, bindings or {})
        return count

    def num_bytes(self, bindings: Mapping[str, int] | None = None) -> int:
        """Size in bytes where each symbol has the bound value."""
        return self.num_elements(bindings) * self.dtype.size_bytes


def handed_over(kind: TensorType) -> TensorType:
    """The type of the array that an executor takes or gives for a value: float32 or int32."""
    return TensorType(DType.F32 if kind.dtype.is_float else DType.I32, kind.shape)
