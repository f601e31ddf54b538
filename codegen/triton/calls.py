"""Calls of kernels: what is compiled, and what a launch of it passes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ...ir.launches import Argument, Extent, Integer, Pointer, Real, TensorMap
from ...ir.types import Dim, DType, Sym
from .boxes import box_of, tile_type

TYPES: Final = {
    DType.F64: "fp64",
    DType.F32: "fp32",
    DType.F16: "fp16",
    DType.BF16: "bf16",
    DType.I64: "i64",
    DType.I32: "i32",
    DType.I8: "i8",
    DType.U8: "u8",
    DType.BOOL: "i1",
}
"""What Triton calls element types."""

ALIGNED_BYTES: Final = 16
"""Addresses and sizes that this divides are known as such to the compiler of kernels."""

Constant = int | float | bool | str


@dataclass(frozen=True, slots=True)
class Typed:
    """A pointer to elements of a type as Triton calls it (`bf16`, `i32`)."""

    pointer: Pointer
    type: str


@dataclass(frozen=True, slots=True)
class Tiles:
    """A dense matrix at a pointer, of which a kernel copies tiles by a descriptor."""

    pointer: Pointer
    dtype: DType
    shape: tuple[Extent, int]
    tile: tuple[int, int]

    @property
    def type(self) -> str:
        """As Triton calls it."""
        return tile_type(TYPES[self.dtype], *self.tile)


@dataclass(frozen=True, slots=True)
class Tuning:
    """How a kernel is compiled: warps of a block, and stages of its pipelined loops."""

    warps: int = 4
    stages: int = 1


@dataclass(frozen=True, slots=True)
class KernelCode:
    """A kernel to compile: what gives other machine code is another one.

    `module` is a file of `kernels/`. `source` is the text of a generated kernel, which then is in
    no file. `parameters` has names with Triton's types, constants among them left out; `aligned`
    are the names of those that `ALIGNED_BYTES` divides. One for `dependent` launches waits for the
    launch before it.
    """

    module: str
    function: str
    parameters: tuple[tuple[str, str], ...]
    aligned: frozenset[str]
    constants: tuple[tuple[str, Constant], ...]
    tuning: Tuning
    source: str | None = None
    dependent: bool = False

    def plain(self) -> dict[str, object]:
        """As JSON, in one order."""
        return {
            "module": self.module,
            "function": self.function,
            "parameters": [list(pair) for pair in self.parameters],
            "aligned": sorted(self.aligned),
            "constants": dict(self.constants),
            "warps": self.tuning.warps,
            "stages": self.tuning.stages,
            "source": self.source,
            "dependent": self.dependent,
        }

    @property
    def key(self) -> str:
        """A name that no other kernel of an artifact has."""
        text = json.dumps(self.plain(), sort_keys=True)
        return f"{self.function}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


Passed = Typed | Tiles | Extent | int | float
"""What a kernel is given: an address, a matrix in tiles, an integer that may depend on the step, a
number."""

ARGUMENTS_OF_TILES: Final = 7
"""How many arguments stand for a matrix in tiles."""


def extent(dim: Dim, *, times: int = 1, divisor: int = 1) -> Extent:
    """A size as an extent: `ceil(times * dim / divisor)`."""
    if isinstance(dim, Sym):
        return Extent(times * dim.scale, dim.name, times * dim.offset, divisor)
    return Extent(-(-times * dim // divisor))


def bind(passed: Mapping[str, Passed]) -> tuple[tuple[Argument, ...], list[tuple[str, str]]]:
    """Arguments as an executor passes them, and Triton's types of the parameters."""
    arguments: list[Argument] = []
    types: list[tuple[str, str]] = []
    for name, value in passed.items():
        match value:
            case Typed():
                arguments.append(value.pointer)
                types.append((name, f"*{value.type}"))
            case Tiles():
                arguments.extend(_tiles(value))
                types.append((name, value.type))
            case float():
                arguments.append(Real(value))
                types.append((name, "fp32"))
            case Extent():
                arguments.append(Integer(value))
                types.append((name, "i32"))
            case int():
                arguments.append(Integer(Extent(value)))
                types.append((name, "i32"))
    return tuple(arguments), types


def _tiles(matrix: Tiles) -> tuple[Argument, ...]:
    """What Triton makes of a descriptor: itself, the shape, then the strides in 64 bits each.

    Those are passed as two numbers of 32, the low one first: they lie at a multiple of 8.
    """
    rows, columns = matrix.shape
    box = box_of(matrix.type)
    shape = (rows, Extent(columns))
    described = TensorMap(matrix.pointer, matrix.dtype.value, shape, box.shape, box.swizzle_bytes)
    numbers = (rows, Extent(columns), Extent(columns), Extent(0), Extent(1), Extent(0))
    return (described, *map(Integer, numbers))


def aligned(passed: Mapping[str, Passed]) -> frozenset[str]:
    """The names of parameters that `ALIGNED_BYTES` divides, whatever the step."""
    return frozenset(name for name, value in passed.items() if _is_aligned(value))


def _is_aligned(value: Passed) -> bool:
    match value:
        case Typed(pointer=pointer):
            return (
                pointer.space in ("arena", "weight", "state")
                and pointer.offset % ALIGNED_BYTES == 0
            )
        case Extent():
            return value.size is None and value.evaluate({}) % ALIGNED_BYTES == 0
        case int():
            return value % ALIGNED_BYTES == 0
    return False
