"""Moves, shifts, fields of bits, and conversions."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .arithmetic import elementwise
from .floats import EIGHT_BITS, eight_bit_values, from_bfloat16, to_bfloat16, to_eight_bits, to_tf32
from .ptx import Instruction, members
from .wave import TYPES, UNSIGNED, Mask, Operands, Step, Wave, opcode, unknown

Array = NDArray[Any]

_ROUNDINGS: Final = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


@opcode("mov", "cvta")
def _move(instruction: Instruction, operands: Operands) -> Step:
    kind = instruction.parts[-1]
    target, source = instruction.operands
    if target.startswith("{"):
        return _unpack(target, source, kind, operands)
    if source.startswith("{"):
        return _pack(target, source, kind, operands)
    bits = "pred" if kind == "pred" else f"b{kind.lstrip('bufs')}"
    write, read = operands.target(target), operands.source(source, bits)
    return lambda wave, mask: write(wave, read(wave), mask)


def _unpack(target: str, source: str, kind: str, operands: Operands) -> Step:
    writes = operands.targets(target)
    bits = int(kind.lstrip("bufs"))
    part = bits // len(writes)
    read, wide = operands.source(source, f"b{bits}"), UNSIGNED[bits]
    shifts: list[Array] = [np.array([[part * place]], wide) for place in range(len(writes))]

    def run(wave: Wave, mask: Mask) -> None:
        value = read(wave)
        for write, shift in zip(writes, shifts, strict=True):
            write(wave, (value >> shift).astype(UNSIGNED[part]), mask)

    return run


def _pack(target: str, source: str, kind: str, operands: Operands) -> Step:
    bits = int(kind.lstrip("bufs"))
    part = bits // len(members(source))
    write, reads, wide = (
        operands.target(target),
        operands.sources(source, f"b{part}"),
        UNSIGNED[bits],
    )
    shifts: list[Array] = [np.array([[part * place]], wide) for place in range(len(reads))]

    def run(wave: Wave, mask: Mask) -> None:
        value: Array = reads[0](wave).astype(wide)
        for read, shift in zip(reads[1:], shifts[1:], strict=True):
            value = value | (read(wave).astype(wide) << shift)
        write(wave, value, mask)

    return run


@opcode("not")
def _not(instruction: Instruction, operands: Operands) -> Step:
    return elementwise(instruction, operands, np.invert)


@opcode("shl", "shr")
def _shift(instruction: Instruction, operands: Operands) -> Step:
    left, kind = instruction.parts[0] == "shl", instruction.parts[-1]
    bits = int(kind[1:])
    target, source, amount = instruction.operands
    read, by = operands.source(source, kind), operands.source(amount, "u32")
    write, dtype = operands.target(target), TYPES[kind]
    most = np.uint32(bits - 1)
    signed = kind[0] == "s"

    def run(wave: Wave, mask: Mask) -> None:
        value, count = read(wave), by(wave)
        near = np.minimum(count, most).astype(dtype)
        result = value << near if left else value >> near
        if not signed and (count > most).any():
            result = np.where(count > most, dtype(0), result)
        write(wave, result, mask)

    return run


@opcode("shf")
def _funnel(instruction: Instruction, operands: Operands) -> Step:
    _, direction, mode, _ = instruction.parts
    target, low, high, amount = instruction.operands
    write = operands.target(target)
    reads = [operands.source(one, "u32") for one in (low, high, amount)]

    def run(wave: Wave, mask: Mask) -> None:
        lower, upper, count = (read(wave).astype(np.uint64) for read in reads)
        count = count & np.uint64(31) if mode == "wrap" else np.minimum(count, np.uint64(32))
        both = (upper << np.uint64(32)) | lower
        both = (both << count) >> np.uint64(32) if direction == "l" else both >> count
        write(wave, (both & np.uint64(0xFFFF_FFFF)).astype(np.uint32), mask)

    return run


@opcode("popc", "clz", "brev")
def _count(instruction: Instruction, operands: Operands) -> Step:
    name, kind = instruction.parts[0], instruction.parts[-1]
    bits = int(kind[1:])
    target, source = instruction.operands
    write, read = operands.target(target), operands.source(source, kind)

    def reversed_(value: Array) -> Array:
        spread = np.unpackbits(value[..., None].view(np.uint8), axis=-1, bitorder="little")
        packed: Array = np.packbits(spread, axis=-1, bitorder="big").view(">u4")
        return packed[..., 0].astype(np.uint32)

    def run(wave: Wave, mask: Mask) -> None:
        value = read(wave)
        if name == "popc":
            result = np.bitwise_count(value).astype(np.uint32)
        elif name == "clz":
            length = np.frexp(value.astype(np.longdouble))[1]
            result = (bits - length).astype(np.uint32)
        else:
            result = reversed_(np.ascontiguousarray(value))
        write(wave, result, mask)

    if name == "brev" and bits != 32:
        raise unknown(instruction)
    return run


@opcode("bfe")
def _extract(instruction: Instruction, operands: Operands) -> Step:
    kind = instruction.parts[-1]
    bits = int(kind[1:])
    target, source, place, length = instruction.operands
    write, read = operands.target(target), operands.source(source, kind)
    start, count = operands.source(place, "u32"), operands.source(length, "u32")

    def run(wave: Wave, mask: Mask) -> None:
        value = read(wave).astype(np.int64 if kind[0] == "s" else np.uint64)
        wide = value.dtype.type
        first = np.minimum(start(wave) & np.uint32(255), np.uint32(63)).astype(value.dtype)
        size = np.minimum(count(wave) & np.uint32(255), np.uint32(64))
        # To the top and down again: this also repeats the sign of what ends within the number.
        used = np.minimum(first + size.astype(value.dtype), wide(bits))
        up = wide(64) - used
        down = wide(64) - np.minimum(used - np.minimum(first, used), wide(64))
        result = (value << up) >> np.minimum(down, wide(63))
        result = np.where((size == 0) | (used <= first), wide(0), result)
        write(wave, result.astype(TYPES[kind]), mask)

    return run


@opcode("bfi")
def _insert(instruction: Instruction, operands: Operands) -> Step:
    bits = int(instruction.parts[-1][1:])
    target, field, base, place, length = instruction.operands
    write, dtype = operands.target(target), UNSIGNED[bits]
    inner, outer = (operands.source(one, f"b{bits}") for one in (field, base))
    start, count = (operands.source(one, "u32") for one in (place, length))

    def run(wave: Wave, mask: Mask) -> None:
        first = (start(wave) & np.uint32(255)).astype(np.uint64)
        size = np.minimum((count(wave) & np.uint32(255)).astype(np.uint64), np.uint64(bits))
        ones = np.where(
            size >= 64, ~np.uint64(0), (np.uint64(1) << (size & np.uint64(63))) - np.uint64(1)
        )
        inside = first < np.uint64(bits)
        chosen = np.where(inside, ones << np.minimum(first, np.uint64(63)), np.uint64(0))
        moved = inner(wave).astype(np.uint64) << np.minimum(first, np.uint64(63))
        result = (outer(wave).astype(np.uint64) & ~chosen) | (moved & chosen)
        write(wave, result.astype(dtype), mask)

    return run


@opcode("prmt")
def _permute(instruction: Instruction, operands: Operands) -> Step:
    if instruction.parts[1:] != ("b32",):
        raise unknown(instruction)
    target, low, high, selector = instruction.operands
    write = operands.target(target)
    reads = [operands.source(one, "b32") for one in (low, high, selector)]

    def run(wave: Wave, mask: Mask) -> None:
        lower, upper, select = (read(wave).astype(np.uint64) for read in reads)
        both = lower | (upper << np.uint64(32))
        result = np.zeros((1, 1), np.uint64)
        for place in range(4):
            which = (select >> np.uint64(4 * place)) & np.uint64(15)
            byte = (both >> ((which & np.uint64(7)) * np.uint64(8))) & np.uint64(255)
            sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
            byte = np.where(which & np.uint64(8), sign, byte)
            result = result | (byte << np.uint64(8 * place))
        write(wave, result.astype(np.uint32), mask)

    return run


@opcode("lop3")
def _logic(instruction: Instruction, operands: Operands) -> Step:
    table = int(instruction.operands[4], 0)

    def function(a: Array, b: Array, c: Array) -> Array:
        result = np.zeros((1, 1), np.uint32)
        for case in range(8):
            if table >> case & 1:
                term = a if case & 4 else ~a
                term = term & (b if case & 2 else ~b)
                result = result | (term & (c if case & 1 else ~c))
        return result

    target, first, second, third, _ = instruction.operands
    write = operands.target(target)
    reads = [operands.source(one, "b32") for one in (first, second, third)]
    return lambda wave, mask: write(wave, function(*(read(wave) for read in reads)), mask)


@opcode("cvt")
def _convert(instruction: Instruction, operands: Operands) -> Step:
    kinds = [
        part
        for part in instruction.parts[1:]
        if part in TYPES or part in ("bf16", "tf32") or part.endswith("x2")
    ]
    if len(kinds) != 2:
        raise unknown(instruction)
    to, source = kinds
    if to.endswith("x2") or source.endswith("x2"):
        return _convert_pairs(instruction, operands, to, source)
    target, text = instruction.operands
    read, write = operands.source(text, source), operands.target(target)
    rounding = next((_ROUNDINGS[part] for part in instruction.parts if part in _ROUNDINGS), None)
    convert = _conversion(to, source, instruction.parts)
    if convert is None:
        raise unknown(instruction)
    # Registers may be wider than the type: signed results are widened with their sign.
    widened = None
    if to[0] == "s" and operands.width(target) > int(to[1:]):
        widened = TYPES[f"s{operands.width(target)}"]

    def run(wave: Wave, mask: Mask) -> None:
        value = read(wave)
        if rounding is not None:
            value = rounding(value)
        value = convert(value)
        write(wave, value if widened is None else value.astype(widened), mask)

    return run


def _conversion(to: str, source: str, parts: tuple[str, ...]) -> Any:
    toward_zero = "rz" in parts
    if to == "bf16":
        if toward_zero:
            return lambda value: (value.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        relu = "relu" in parts
        return lambda value: to_bfloat16(
            np.fmax(value, 0).astype(np.float32) if relu else value.astype(np.float32)
        )
    if to == "tf32":
        half = np.uint32(0x1000)
        return lambda value: to_tf32((value.view(np.uint32) + half).view(np.float32))
    dtype = np.dtype(TYPES[to])
    if dtype.kind == "f":
        if toward_zero and dtype.itemsize < np.dtype(TYPES.get(source, np.float32)).itemsize:
            return lambda value: _toward_zero(value, dtype)
        if "sat" in parts:
            return lambda value: np.nan_to_num(np.clip(value, 0, 1), nan=0.0).astype(dtype)
        return lambda value: value.astype(dtype)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    if source[0] == "f" or source == "bf16":
        return lambda value: _to_integer(value, dtype)
    if "sat" in parts:
        return lambda value: np.clip(value.astype(object), low, high).astype(dtype)
    return lambda value: value.astype(dtype)


def _to_integer(value: Array, dtype: np.dtype[Any]) -> Array:
    """Integers by the value, the nearest one there is; NaN gives 0."""
    limits = np.iinfo(dtype)
    wide = value.astype(np.longdouble if dtype.itemsize == 8 else np.float64)
    clipped = np.clip(wide, wide.dtype.type(limits.min), wide.dtype.type(limits.max))
    return np.where(np.isnan(wide), 0, clipped).astype(dtype)


def _toward_zero(value: Array, dtype: np.dtype[Any]) -> Array:
    near = value.astype(dtype)
    beyond = np.abs(near.astype(value.dtype)) > np.abs(value)
    return np.where(beyond, np.nextafter(near, dtype.type(0)), near)


def _convert_pairs(instruction: Instruction, operands: Operands, to: str, source: str) -> Step:
    """The second operand, or the only one's low half, is the low half of the result."""
    target, *texts = instruction.operands
    write = operands.target(target)
    if source == "f32":
        high, low = (operands.source(one, "f32") for one in texts)
        relu = "relu" in instruction.parts

        def from_singles(wave: Wave, mask: Mask) -> None:
            halves = [read(wave) for read in (low, high)]
            if relu:
                halves = [np.fmax(half, np.float32(0)) for half in halves]
            write(wave, _packed(to, *halves), mask)

        return from_singles
    bits = 16 if source[:4] in EIGHT_BITS else 32
    read = operands.source(texts[0], f"b{bits}")

    def from_pairs(wave: Wave, mask: Mask) -> None:
        value = read(wave)
        half = value.dtype.type(bits // 2)
        low_bits = value & value.dtype.type((1 << (bits // 2)) - 1)
        high_bits = value >> half
        write(wave, _packed(to, _single(source, low_bits), _single(source, high_bits)), mask)

    return from_pairs


def _single(kind: str, bits: Array) -> Array:
    name = kind.removesuffix("x2")
    if name in EIGHT_BITS:
        return eight_bit_values(name)[bits]
    if name == "bf16":
        return from_bfloat16(bits)
    return bits.astype(np.uint16).view(np.float16).astype(np.float32)


def _packed(kind: str, low: Array, high: Array) -> Array:
    name = kind.removesuffix("x2")
    if name in EIGHT_BITS:
        small = to_eight_bits(name, low).astype(np.uint16)
        return small | (to_eight_bits(name, high).astype(np.uint16) << np.uint16(8))
    if name == "bf16":
        halves = [to_bfloat16(value) for value in (low, high)]
    else:
        halves = [value.astype(np.float16).view(np.uint16) for value in (low, high)]
    return halves[0].astype(np.uint32) | (halves[1].astype(np.uint32) << np.uint32(16))
