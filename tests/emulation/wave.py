"""The state of the blocks that run in lockstep, and how operands of instructions reach it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from .errors import EmulationError
from .floats import from_bfloat16, to_bfloat16
from .memory import Allocation, Memory
from .ptx import Instruction, Module, members
from .shared import Shared

if TYPE_CHECKING:
    from .blocks import Races

Array = NDArray[Any]
Mask = NDArray[np.bool_] | None
"""The threads that an instruction is for, broadcastable to all; None for all."""

UNSIGNED: Final = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
TYPES: Final[dict[str, type[np.generic]]] = {
    "pred": np.bool_,
    **{f"{kind}{bits}": UNSIGNED[bits] for kind in ("b", "u") for bits in (8, 16, 32, 64)},
    "s8": np.int8,
    "s16": np.int16,
    "s32": np.int32,
    "s64": np.int64,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
}


@dataclass(slots=True, eq=False)
class Wave:
    """Blocks of one launch in lockstep.

    A register is an array that broadcasts to `[blocks, threads]`: what depends on the thread alone
    or on the block alone is kept, and computed, once. Arrays in registers are never changed.
    """

    blocks: int
    threads: int
    registers: list[Array]
    special: dict[str, Array]
    parameters: bytes
    memory: Memory
    shared: Shared
    block: Array  # [blocks, 1]
    warp: Array  # [1, threads]
    lane: Array  # [1, threads]
    state: dict[str, Any] = field(default_factory=dict)
    """What single kinds of instructions keep, such as copies that have not landed."""

    place: int = 0
    """Of the instruction that runs."""

    active: Mask = None
    """The threads that run together, whatever an instruction's predicate says."""

    stalled: bool = False
    """Whether a wait just failed: other threads should go first."""

    progress: int = 0
    """Counts what waits may wait for."""

    unsettled: set[Allocation] | None = None
    """What launches before this one, which it does not wait for yet, have written."""

    first_block: int = 0
    """The number of the first of the blocks in the launch."""

    races: Races | None = None
    """Looks for races with other blocks, where there are any."""

    def full(self, values: Array) -> Array:
        """Values of all threads, one each."""
        shape = (self.blocks, self.threads)
        return values if values.shape == shape else np.broadcast_to(values, shape)

    def warps(self, values: Array) -> Array:
        """Values by warp: `[warps of all blocks, 32]`."""
        return np.ascontiguousarray(self.full(values)).reshape(-1, 32)

    def lanes(self, values: Array) -> Array:
        """The inverse of `warps`."""
        return values.reshape(self.blocks, self.threads)


Step = Callable[[Wave, Mask], None]
Source = Callable[[Wave], Array]
Target = Callable[[Wave, Array, Mask], None]


class Operands:
    """Resolves operands of one kernel once, into functions on a wave."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self._slots: dict[str, int] = {}
        self._widths: list[int] = []

    def poisoned(self) -> list[Array]:
        """Registers as a kernel finds them."""
        pattern = 0xA5A5_A5A5_A5A5_A5A5
        return [
            np.array([[False]])
            if width == 1
            else np.array([[pattern & ((1 << width) - 1)]], UNSIGNED[width])
            for width in self._widths
        ]

    def width(self, name: str) -> int:
        """The bits of a register."""
        widths = self.module.widths
        if name in widths:
            return widths[name]
        family = _family(name)
        if family not in widths:
            raise EmulationError(f"{name} is not a register")
        return widths[family]

    def is_register(self, text: str) -> bool:
        """Whether an operand is a register, not a special one."""
        return text in self.module.widths or _family(text) in self.module.widths

    def slot(self, name: str) -> int:
        """Where a register lies in `Wave.registers`."""
        if name not in self._slots:
            self._slots[name] = len(self._slots)
            self._widths.append(self.width(name))
        return self._slots[name]

    def source(self, text: str, kind: str) -> Source:
        """An operand as values of a PTX type: floats as numpy has them, bf16 as float32."""
        if kind == "bf16":
            bits = self.source(text, "b16")
            return lambda wave: from_bfloat16(bits(wave))
        dtype = np.dtype(TYPES[kind])
        if self.is_register(text):
            return self._register(self.slot(text), self.width(text), dtype)
        if text.startswith("%"):
            return lambda wave: wave.special[text].astype(dtype, copy=False)
        value = self._constant(text, dtype)
        return lambda wave: value

    def _register(self, slot: int, width: int, dtype: np.dtype[Any]) -> Source:
        bits = 1 if dtype == np.bool_ else dtype.itemsize * 8
        if bits == width:
            if dtype == UNSIGNED[width]:
                return lambda wave: wave.registers[slot]
            return lambda wave: wave.registers[slot].view(dtype)
        narrow = UNSIGNED[bits]
        return lambda wave: wave.registers[slot].astype(narrow).view(dtype)

    def _constant(self, text: str, dtype: np.dtype[Any]) -> Array:
        if text in self.module.shared:
            return np.array([[self.module.shared[text]]], dtype)
        for parameter in self.module.parameters:
            if parameter.name == text:  # its address: descriptors are read by it
                return np.array([[PARAMETER_BASE + parameter.offset]], dtype)
        if text.startswith(("0f", "0d")):
            bits = int(text[2:], 16)
            size = 4 if text[1] == "f" else 8
            raw = np.array([[bits]], f"u{size}")
            return raw.view(dtype) if dtype.itemsize == size else raw.view(f"f{size}").astype(dtype)
        try:
            value = int(text.rstrip("U"), 0)
        except ValueError:
            raise EmulationError(f"the operand {text!r} is not known") from None
        if dtype == np.bool_:
            return np.array([[value != 0]])
        if dtype.kind == "f":
            return np.array([[value]], dtype)
        raw = np.array([[value & ((1 << (8 * dtype.itemsize)) - 1)]], f"u{dtype.itemsize}")
        return raw.view(dtype)

    def target(self, text: str) -> Target:
        """Where a result goes; narrower ones are widened with zeros."""
        if text == "_":
            return lambda wave, values, mask: None
        slot, width = self.slot(text), self.width(text)
        unsigned = np.dtype(UNSIGNED[width])

        def write(wave: Wave, values: Array, mask: Mask) -> None:
            if values.dtype != unsigned:
                values = _as_bits(values, unsigned)
            if mask is not None:
                values = np.where(mask, values, wave.registers[slot])
            wave.registers[slot] = values

        return write

    def rounded(self, text: str, kind: str) -> Target:
        """As `target`, for values that were computed in float32 where the type is bf16."""
        target = self.target(text)
        if kind != "bf16":
            return target
        return lambda wave, values, mask: target(wave, to_bfloat16(values), mask)

    def address(self, text: str, space: str) -> Source:
        """The addresses in `[base + offset]`: uint64 of global, int64 of shared memory."""
        found = re.match(r"^\[\s*([%\w$@#]+)\s*(?:\+\s*(-?\w+))?\s*\]$", text)
        if found is None:
            raise EmulationError(f"the address {text!r} is not known")
        offset = int(found[2] or "0", 0)
        if space == "shared":
            base = self.source(found[1], "u32")
            return lambda wave: base(wave).astype(np.int64) + offset
        wide = self.source(found[1], "u64")
        if not offset:
            return wide
        addend = np.uint64(offset & 0xFFFF_FFFF_FFFF_FFFF)
        return lambda wave: wide(wave) + addend

    def sources(self, text: str, kind: str) -> tuple[Source, ...]:
        """Each of `{a, b}`."""
        return tuple(self.source(one, kind) for one in members(text))

    def targets(self, text: str) -> tuple[Target, ...]:
        """Each of `{a, b}`."""
        return tuple(self.target(one) for one in members(text))


def _family(name: str) -> str:
    """The name of a numbered register without its number."""
    found = re.match(r"(%[a-z]+|.*#)\d+$", name)
    return found[1] if found else ""


PARAMETER_BASE: Final = 0x7D00_0000_0000
"""The made-up address of the packed buffer of parameters."""


def _as_bits(values: Array, unsigned: np.dtype[Any]) -> Array:
    if unsigned == np.bool_:
        return values.astype(np.bool_)
    if values.dtype.itemsize == unsigned.itemsize and values.dtype != np.bool_:
        return values.view(unsigned)
    if values.dtype.kind in "fi":
        values = values.view(f"u{values.dtype.itemsize}")
    return values.astype(unsigned)


def both(first: Mask, second: Mask) -> Mask:
    """The threads that are in two masks."""
    if first is None:
        return second
    return first if second is None else first & second


Decoder = Callable[[Instruction, Operands], Step]
DECODERS: Final[dict[str, Decoder]] = {}
"""By the first part of the opcode; filled by the modules of the families of instructions."""


def opcode(*names: str) -> Callable[[Decoder], Decoder]:
    """Registers a decoder."""

    def register(decoder: Decoder) -> Decoder:
        for name in names:
            DECODERS[name] = decoder
        return decoder

    return register


def unknown(instruction: Instruction) -> EmulationError:
    """For an instruction that is not modelled."""
    return EmulationError(f"{instruction.opcode} is not modelled")
