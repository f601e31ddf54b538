"""Arithmetic and comparisons of integers and floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .floats import from_bfloat16, to_bfloat16
from .ptx import Instruction
from .wave import TYPES, UNSIGNED, Mask, Operands, Source, Step, Target, Wave, opcode, unknown

Array = NDArray[Any]
Function = Callable[..., Array]

HALF: Final = np.uint32(0xFFFF)
SHIFT: Final = np.uint32(16)


def pairwise(kind: str, function: Function) -> Function:
    """A function of floats, on pairs of them in 32 bits."""

    def halves(bits: Array) -> tuple[Array, Array]:
        low, high = bits & HALF, bits >> SHIFT
        if kind == "bf16x2":
            return from_bfloat16(low), from_bfloat16(high)
        return low.astype(np.uint16).view(np.float16), high.astype(np.uint16).view(np.float16)

    def pack(values: Array) -> Array:
        bits = (
            to_bfloat16(values) if kind == "bf16x2" else values.astype(np.float16).view(np.uint16)
        )
        return bits.astype(np.uint32)

    def run(*operands: Array) -> Any:
        split = [halves(bits) for bits in operands]
        low = function(*(low for low, _ in split))
        high = function(*(high for _, high in split))
        return pack(low) | (pack(high) << SHIFT)

    return run


def elementwise(
    instruction: Instruction, operands: Operands, function: Function, kind: str | None = None
) -> Step:
    """The step that puts a function of all operands but the first into the first."""
    kind = kind or instruction.parts[-1]
    target, *texts = instruction.operands
    if kind in ("bf16x2", "f16x2"):
        function = pairwise(kind, function)
        write, sources = operands.target(target), [operands.source(one, "b32") for one in texts]
    else:
        if kind not in TYPES and kind != "bf16":
            raise unknown(instruction)
        write, sources = (
            operands.rounded(target, kind),
            [operands.source(one, kind) for one in texts],
        )
    if "sat" in instruction.parts and kind.startswith(("f", "bf")):
        function = _saturated(function)
    return _step(write, sources, function)


def _step(write: Target, sources: list[Source], function: Function) -> Step:
    if len(sources) == 2:
        first, second = sources

        def binary(wave: Wave, mask: Mask) -> None:
            write(wave, function(first(wave), second(wave)), mask)

        return binary

    def run(wave: Wave, mask: Mask) -> None:
        write(wave, function(*(source(wave) for source in sources)), mask)

    return run


def _saturated(function: Function) -> Function:
    return lambda *operands: np.nan_to_num(np.clip(function(*operands), 0, 1), nan=0.0)


def _divide(kind: str) -> Function:
    if kind[0] in "fb":
        return np.divide

    def divide(dividend: Array, divisor: Array) -> Any:
        # Truncated; what division by zero gives is undefined, and here the dividend.
        divisor = np.where(divisor == 0, divisor.dtype.type(1), divisor)
        quotient = dividend // divisor
        if kind[0] == "u":
            return quotient
        inexact = (quotient * divisor != dividend) & ((dividend < 0) != (divisor < 0))
        return quotient + inexact

    return divide


def _remainder(dividend: Array, divisor: Array) -> Array:
    return np.fmod(dividend, np.where(divisor == 0, divisor.dtype.type(1), divisor))


def fused(first: Array, second: Array, third: Array) -> Array:
    """`first * second + third`, rounded once (float32 and below; float64 by extended precision)."""
    wide = np.float64 if first.dtype.itemsize < 8 else np.longdouble
    sum_ = first.astype(wide) * second + third
    return sum_.astype(first.dtype)


def high_product(bits: int, signed: bool) -> Function:
    """The upper half of a product."""
    if bits < 64:
        wide = np.dtype(f"{'i' if signed else 'u'}{bits // 4}")
        narrow = np.dtype(f"{'i' if signed else 'u'}{bits // 8}")
        return lambda x, y: ((x.astype(wide) * y.astype(wide)) >> wide.type(bits)).astype(narrow)
    low, half = np.uint64(0xFFFF_FFFF), np.uint64(32)

    def run(x: Array, y: Array) -> Any:
        a, b = x.view(np.uint64), y.view(np.uint64)
        cross = (a >> half) * (b & low) + (((a & low) * (b & low)) >> half)
        other = (a & low) * (b >> half) + (cross & low)
        high = (a >> half) * (b >> half) + (cross >> half) + (other >> half)
        if signed:
            high = high - np.where(x < 0, b, np.uint64(0)) - np.where(y < 0, a, np.uint64(0))
        return high

    return run


@opcode("add", "sub", "and", "or", "xor", "min", "max", "div", "rem")
def _binary(instruction: Instruction, operands: Operands) -> Step:
    name, kind = instruction.parts[0], instruction.parts[-1]
    if {"cc", "sat"} & set(instruction.parts) and kind[0] not in "fb":
        raise unknown(instruction)
    functions: dict[str, Function] = {
        "add": np.add,
        "sub": np.subtract,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "div": _divide(kind),
        "rem": _remainder,
    }
    if name in functions:
        return elementwise(instruction, operands, functions[name])
    real = kind[0] == "f" or kind.startswith("bf")
    if not real:
        return elementwise(instruction, operands, np.minimum if name == "min" else np.maximum)
    if "NaN" in instruction.parts:  # NaN goes on; otherwise the other operand is the result
        return elementwise(instruction, operands, np.minimum if name == "min" else np.maximum)
    return elementwise(instruction, operands, np.fmin if name == "min" else np.fmax)


@opcode("mul", "mad", "fma", "mul24")
def _products(instruction: Instruction, operands: Operands) -> Step:
    name, parts, kind = instruction.parts[0], instruction.parts, instruction.parts[-1]
    if name == "mul24" or "cc" in parts:
        raise unknown(instruction)
    if "wide" in parts:
        return _wide(instruction, operands)
    if "hi" in parts:
        high = high_product(int(kind[1:]), kind[0] == "s")
        if name == "mul":
            return elementwise(instruction, operands, high)
        dtype = UNSIGNED[int(kind[1:])]
        return elementwise(
            instruction, operands, lambda x, y, z: high(x, y).view(dtype) + z.view(dtype)
        )
    if name == "mul":
        return elementwise(instruction, operands, np.multiply)
    if kind[0] == "f" or kind.startswith("bf"):
        relu = "relu" in parts
        if relu:
            return elementwise(instruction, operands, lambda x, y, z: np.fmax(fused(x, y, z), 0))
        return elementwise(instruction, operands, fused)
    return elementwise(instruction, operands, lambda x, y, z: x * y + z)


def _wide(instruction: Instruction, operands: Operands) -> Step:
    kind = instruction.parts[-1]
    double = f"{kind[0]}{2 * int(kind[1:])}"
    dtype = TYPES[double]
    target, *texts = instruction.operands
    write = operands.target(target)
    sources = [operands.source(one, kind) for one in texts[:2]]
    if instruction.parts[0] == "mul":
        return _step(write, sources, lambda x, y: x.astype(dtype) * y.astype(dtype))
    sources.append(operands.source(texts[2], double))
    return _step(write, sources, lambda x, y, z: x.astype(dtype) * y.astype(dtype) + z)


_UNARY: Final[dict[str, Function]] = {
    "neg": np.negative,
    "abs": np.abs,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "rcp": lambda x: 1 / x,
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}


@opcode(*_UNARY)
def _unary(instruction: Instruction, operands: Operands) -> Step:
    function = _UNARY[instruction.parts[0]]
    kind = instruction.parts[-1]
    if kind not in TYPES or kind == "f16":
        return elementwise(instruction, operands, lambda x: function(x).astype(x.dtype))
    one = np.dtype(TYPES[kind]).type
    return elementwise(instruction, operands, lambda x: function(x).astype(one, copy=False))


@opcode("copysign")
def _copysign(instruction: Instruction, operands: Operands) -> Step:
    return elementwise(instruction, operands, lambda sign, value: np.copysign(value, sign))


_COMPARISONS: Final[dict[str, Function]] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_COMBINED: Final[dict[str, Function]] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
}


def _comparison(name: str, real: bool) -> Function:
    if name == "nan":
        return lambda x, y: np.isnan(x) | np.isnan(y)
    if name == "num":
        return lambda x, y: ~(np.isnan(x) | np.isnan(y))
    if name in _COMPARISONS:
        plain = _COMPARISONS[name]
        if name == "ne" and real:  # false for NaN, unlike numpy's
            return lambda x, y: (x < y) | (x > y)
        return plain
    ordered = _COMPARISONS[name[:2]]
    return lambda x, y: ordered(x, y) | np.isnan(x) | np.isnan(y)


@opcode("setp")
def _compare(instruction: Instruction, operands: Operands) -> Step:
    parts, kind = instruction.parts, instruction.parts[-1]
    real = kind[0] == "f" or kind.startswith("bf")
    compare = _comparison(parts[1], real)
    targets = [operands.target(one.strip()) for one in instruction.operands[0].split("|")]
    first, second = (operands.source(one, kind) for one in instruction.operands[1:3])
    combine = next((_COMBINED[part] for part in parts[2:-1] if part in _COMBINED), None)
    if len(targets) == 1 and combine is None:
        write = targets[0]

        def plain(wave: Wave, mask: Mask) -> None:
            write(wave, compare(first(wave), second(wave)), mask)

        return plain
    last = instruction.operands[3] if combine else "1"
    other = operands.source(last.removeprefix("!"), "pred")
    flip = last.startswith("!")

    def run(wave: Wave, mask: Mask) -> None:
        result = compare(first(wave), second(wave))
        for write, value in zip(targets, (result, ~result), strict=False):
            write(wave, combine(value, other(wave) ^ flip) if combine else value, mask)

    return run


@opcode("selp")
def _select(instruction: Instruction, operands: Operands) -> Step:
    bits = f"b{instruction.parts[-1].lstrip('bufs')}"
    target, yes, no, which = instruction.operands
    write, which_ = operands.target(target), operands.source(which, "pred")
    first, second = operands.source(yes, bits), operands.source(no, bits)

    def run(wave: Wave, mask: Mask) -> None:
        write(wave, np.where(which_(wave), first(wave), second(wave)), mask)

    return run
