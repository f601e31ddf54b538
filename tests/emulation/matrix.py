"""Products of tensor cores with fragments in registers, and the copies of 8 x 8 matrices."""

from __future__ import annotations

import re
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .errors import EmulationError
from .floats import EIGHT_BITS, eight_bit_values, from_bfloat16, to_tf32
from .ptx import Instruction
from .shared import Access
from .wave import Mask, Operands, Source, Step, Wave, opcode, unknown

Array = NDArray[Any]

ELEMENT_BYTES: Final = {"bf16": 2, "f16": 2, "tf32": 4, "s8": 1, "u8": 1, "e4m3": 1, "e5m2": 1}


def as_float32(kind: str, bits: Array) -> Array:
    """The elements of a matrix, each of which is exact in float32."""
    if kind == "bf16":
        return from_bfloat16(bits)
    if kind == "f16":
        return bits.view(np.float16).astype(np.float32)
    if kind == "tf32":
        return to_tf32(bits.view(np.float32))
    if kind in EIGHT_BITS:
        return eight_bit_values(kind)[bits]
    return bits.view(np.int8 if kind == "s8" else np.uint8).astype(np.float32)


def fragments(wave: Wave, sources: tuple[Source, ...], kind: str) -> Array:
    """`[registers, warps, 8 groups, 4 threads, elements]` of registers of a fragment."""
    size = ELEMENT_BYTES[kind]
    bits = np.stack([wave.warps(source(wave)) for source in sources])
    elements = bits.view(f"u{size}").reshape(len(sources), -1, 8, 4, 4 // size)
    return as_float32(kind, elements)


def left_operand(wave: Wave, sources: tuple[Source, ...], kind: str) -> Array:
    """`[warps, 16, K]` of the left operand: registers go down the rows first, then along K."""
    parts = fragments(wave, sources, kind)
    count, warps = parts.shape[:2]
    parts = parts.reshape(count // 2, 2, *parts.shape[1:])
    return parts.transpose(2, 1, 3, 0, 4, 5).reshape(warps, 16, -1)


def accumulate(kind: str, before: Array, product: Array) -> Array:
    """An accumulator and an exact or float32 product."""
    if kind == "s32":
        return before + product.astype(np.int32)
    return (before + product).astype(before.dtype)


def products(x: Array, y: Array) -> Array:
    """`x` times `y` transposed, with a row's bits the same wherever it stands in `x`.

    numpy adds in an order that depends on the place. Sums in float64 of so few products of short
    numbers are exact, but for exponents far apart.
    """
    wide = np.matmul(x.astype(np.float64), y.transpose(0, 2, 1).astype(np.float64))
    narrow: Array = wide.astype(np.float32)
    return narrow


@opcode("mma")
def _multiply(instruction: Instruction, operands: Operands) -> Step:
    shape = re.match(r"m16n8k(\d+)$", next(p for p in instruction.parts if p.startswith("m")))
    shape = shape or next(
        filter(None, (re.match(r"m16n8k(\d+)$", p) for p in instruction.parts)), None
    )
    result, left, right, _ = instruction.parts[-4:]
    if shape is None or left not in ELEMENT_BYTES or right not in ELEMENT_BYTES:
        raise unknown(instruction)
    if result not in ("f32", "s32", "f16") or "row" not in instruction.parts:
        raise unknown(instruction)
    targets = operands.targets(instruction.operands[0])
    a, b = (operands.sources(text, "b32") for text in instruction.operands[1:3])
    kind = "b32" if result == "f16" else result
    c = operands.sources(instruction.operands[3], kind)

    def run(wave: Wave, mask: Mask) -> None:
        x = left_operand(wave, a, left)
        y = fragments(wave, b, right).transpose(1, 2, 0, 3, 4).reshape(len(x), 8, -1)
        product = products(x, y)
        # Rows g and g + 8 of columns 2t and 2t + 1: [warps, 2, 8, 4, 2] by register.
        product = product.reshape(-1, 2, 8, 4, 2)
        before = [wave.warps(source(wave)) for source in c]
        if result == "f16":
            for row, write in enumerate(targets):
                pair = before[row].view(np.float16).reshape(-1, 8, 4, 2)
                sums = np.ascontiguousarray(accumulate("f16", pair, product[:, row]))
                write(wave, wave.lanes(sums.view(np.uint32).reshape(-1, 32)), mask)
            return
        for place, write in enumerate(targets):
            part = product[:, place >> 1, :, :, place & 1].reshape(-1, 32)
            write(wave, wave.lanes(accumulate(result, before[place], part)), mask)

    return run


def _rows(wave: Wave, at: Array, mask: Mask, count: int) -> tuple[Array, Array, Array, Array]:
    """Blocks, offsets and warps of the rows that warps address, and which rows those are."""
    addresses = wave.warps(at)[:, : 8 * count].reshape(-1)
    warps = np.arange(wave.blocks * wave.threads // 32)
    live = np.ones(len(warps), bool) if mask is None else wave.warps(mask).all(1)
    if mask is not None and (wave.warps(mask).any(1) != live).any():
        raise EmulationError("not all threads of a warp take part")
    chosen = np.flatnonzero(np.repeat(live, 8 * count))
    per_block = wave.threads // 32
    blocks = np.repeat(warps // per_block, 8 * count)[chosen]
    agents = np.repeat(warps % per_block, 8 * count)[chosen]
    return blocks, addresses[chosen], agents, chosen


@opcode("ldmatrix")
def _load_matrix(instruction: Instruction, operands: Operands) -> Step:
    if "m8n8" not in instruction.parts or instruction.parts[-1] != "b16":
        raise unknown(instruction)
    targets = operands.targets(instruction.operands[0])
    where, count = operands.address(instruction.operands[1], "shared"), len(targets)
    turned = "trans" in instruction.parts

    def run(wave: Wave, mask: Mask) -> None:
        blocks, at, agents, chosen = _rows(wave, where(wave), mask, count)
        wave.shared.note(blocks, at, 16, Access(wave.place, agents, write=False))
        warps = wave.blocks * wave.threads // 32
        rows = np.zeros((warps * count * 8, 8), np.uint16)
        rows[chosen] = wave.shared.load(blocks, at, 16, 2)
        matrices = rows.reshape(warps, count, 8, 8)
        if turned:
            matrices = np.ascontiguousarray(matrices.transpose(0, 1, 3, 2))
        pairs = matrices.view(np.uint32).reshape(warps, count, 32)
        for place, write in enumerate(targets):
            write(wave, wave.lanes(np.ascontiguousarray(pairs[:, place])), mask)

    return run


@opcode("stmatrix")
def _store_matrix(instruction: Instruction, operands: Operands) -> Step:
    if "m8n8" not in instruction.parts or instruction.parts[-1] != "b16":
        raise unknown(instruction)
    where = operands.address(instruction.operands[0], "shared")
    sources = operands.sources(instruction.operands[1], "b32")
    turned, count = "trans" in instruction.parts, len(sources)

    def run(wave: Wave, mask: Mask) -> None:
        pairs = np.stack([wave.warps(source(wave)) for source in sources], 1)
        matrices = pairs.view(np.uint16).reshape(-1, count, 8, 8)
        if turned:
            matrices = matrices.transpose(0, 1, 3, 2)
        blocks, at, agents, chosen = _rows(wave, where(wave), mask, count)
        wave.shared.note(blocks, at, 16, Access(wave.place, agents, write=True))
        rows = np.ascontiguousarray(matrices).reshape(-1, 8)[chosen]
        wave.shared.store(blocks, at, rows)

    return run


@opcode("movmatrix")
def _move_matrix(instruction: Instruction, operands: Operands) -> Step:
    write = operands.target(instruction.operands[0])
    read = operands.source(instruction.operands[1], "b32")

    def run(wave: Wave, mask: Mask) -> None:
        matrices = wave.warps(read(wave)).view(np.uint16).reshape(-1, 8, 8)
        turned = np.ascontiguousarray(matrices.transpose(0, 2, 1))
        write(wave, wave.lanes(turned.view(np.uint32).reshape(-1, 32)), mask)

    return run
