"""Products of four warps (wgmma), whose operands lie in shared memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .errors import EmulationError
from .groups import groups_of
from .matrix import ELEMENT_BYTES, accumulate, as_float32, left_operand, products
from .ptx import Instruction
from .shared import Access, Order
from .wave import TYPES, Mask, Operands, Source, Step, Target, Wave, both, opcode, unknown

Array = NDArray[Any]

_WIDTHS: Final = {1: 128, 2: 64, 3: 32}
"""Bytes that a swizzle spans, by its code in a descriptor."""

SWIZZLE_ROWS: Final = {128: 7, 64: 3, 32: 1, 0: 0}


def swizzled(offsets: Array, width: int) -> Array:
    """Where 16 bytes lie: bits 4 to 6 are mixed with bits 7 to 9, as many as the width has."""
    mixed: Array = offsets ^ (((offsets >> 7) & SWIZZLE_ROWS[width]) << 4)
    return mixed


@dataclass(frozen=True, slots=True)
class _Product:
    """One instruction: `[64, K] x [K, columns]`, 32 bytes of K."""

    columns: int
    left: str
    right: str
    result: str
    targets: tuple[Target, ...]
    before: tuple[Source, ...]
    registers: tuple[Source, ...] | None
    matrices: tuple[Source, ...]
    keep: Source
    turned: tuple[bool, bool]


@opcode("wgmma")
def _warpgroup(instruction: Instruction, operands: Operands) -> Step:
    name = instruction.parts[1]
    if name == "fence":
        return lambda wave, mask: None
    if name == "commit_group":
        return lambda wave, mask: groups_of(wave, "wgmma").commit(wave)
    if name == "wait_group":
        keep = int(instruction.operands[0], 0)
        return lambda wave, mask: groups_of(wave, "wgmma").wait(wave, keep)
    if name != "mma_async" or "sp" in instruction.parts:
        raise unknown(instruction)
    product = _read(instruction, operands)

    def run(wave: Wave, mask: Mask) -> None:
        if wave.threads % 128:
            raise EmulationError("a warpgroup has 128 threads")
        groups_of(wave, "wgmma").add(wave, _job(wave, product, mask))

    return run


def _read(instruction: Instruction, operands: Operands) -> _Product:
    shape = next(
        (f for f in (re.match(r"m64n(\d+)k(\d+)$", p) for p in instruction.parts) if f), None
    )
    result, left, right = instruction.parts[-3:]
    if shape is None or left not in ELEMENT_BYTES or result not in ("f32", "s32"):
        raise unknown(instruction)
    texts = instruction.operands
    in_registers = texts[1].startswith("{")
    # After the flag that keeps the accumulator: signs of both operands (not of integers), then
    # which of those in shared memory are turned (16 bits alone).
    rest = texts[4:]
    if left not in ("s8", "u8"):
        if any(int(one, 0) != 1 for one in rest[:2]):
            raise unknown(instruction)
        rest = rest[2:]
    flags = [one.strip() == "1" for one in rest]
    flags = [*([False] if in_registers else []), *flags, False, False]
    return _Product(
        columns=int(shape[1]),
        left=left,
        right=right,
        result=result,
        targets=operands.targets(texts[0]),
        before=operands.sources(texts[0], result),
        registers=operands.sources(texts[1], "b32") if in_registers else None,
        matrices=tuple(operands.source(one, "b64") for one in texts[1 + in_registers : 3]),
        keep=operands.source(texts[3], "pred"),
        turned=(flags[0], flags[1]),
    )


def _job(wave: Wave, product: _Product, mask: Mask) -> Any:
    """Operands in registers and descriptors are taken now, shared memory when the result lands."""
    groups = wave.blocks * wave.threads // 128
    left = None
    if product.registers is not None:
        left = left_operand(wave, product.registers, product.left).reshape(groups, 64, -1)
    matrices = [
        np.array(wave.full(one(wave)).reshape(groups, 128)[:, 0]) for one in product.matrices
    ]
    keep = wave.full(product.keep(wave))
    order = wave.shared.order

    def run(landing: Mask) -> None:
        taking = both(mask, landing)
        live = _live(wave, taking)
        x = left
        if x is None:
            x = _tile(wave, matrices[0], (64, product.left, product.turned[0]), live, order)
        y = _tile(
            wave, matrices[-1], (product.columns, product.right, product.turned[1]), live, order
        )
        sums = products(x, y)
        # Rows 16w + 8h + g, columns 8c + 2t + e: register 4c + 2h + e of thread t of group g of w.
        sums = sums.reshape(groups, 4, 2, 8, product.columns // 8, 4, 2)
        parts = sums.transpose(4, 2, 6, 0, 1, 3, 5).reshape(len(product.targets), wave.blocks, -1)
        zero = np.zeros((1, 1), TYPES[product.result])
        for place, write in enumerate(product.targets):
            before = np.where(keep, product.before[place](wave), zero)
            write(wave, accumulate(product.result, before, parts[place]), taking)

    return run


def _live(wave: Wave, mask: Mask) -> Array:
    """Which groups of four warps take part."""
    taking = wave.full(np.ones((1, 1), bool) if mask is None else mask)
    return np.asarray(taking.reshape(-1, 128).all(1))


def _tile(
    wave: Wave, descriptors: Array, what: tuple[int, str, bool], live: Array, order: Order
) -> Array:
    """`[groups, rows, K]` of a matrix in shared memory, by its descriptor."""
    rows, kind, turned = what
    size = ELEMENT_BYTES[kind]
    start, leading, stride = (
        (((descriptors >> np.uint64(shift)) & np.uint64(0x3FFF)) << np.uint64(4)).astype(np.int64)
        for shift in (0, 16, 32)
    )
    codes = np.unique((descriptors[live] >> np.uint64(62)).astype(int))
    depth = 32 // size
    if not live.any():
        return np.zeros((len(descriptors), rows, depth), np.float32)
    if len(codes) != 1 or codes[0] not in _WIDTHS:
        raise EmulationError("a matrix that is not swizzled is not modelled")
    width = _WIDTHS[int(codes[0])]
    if turned:  # K goes over rows of memory, and the matrix's rows lie side by side
        k, chunk = np.arange(depth)[:, None], np.arange(rows // 8)[None, :]
        per = width // 16
        inner = (k % 8) * width + (chunk % per) * 16
        outer = (chunk // per)[None] * leading[:, None, None] + (k // 8)[None] * stride[
            :, None, None
        ]
    else:
        row, chunk = np.arange(rows)[:, None], np.arange(2)[None, :]
        inner = (row % 8) * width + chunk * 16
        outer = np.broadcast_to((row // 8)[None] * stride[:, None, None], (len(start), rows, 2))
    offsets = swizzled(start[:, None, None] + inner[None] + outer, width)[live]
    per_block = wave.threads // 128
    groups = np.flatnonzero(live)
    blocks = np.broadcast_to((groups // per_block)[:, None, None], offsets.shape)
    agents = np.broadcast_to((groups % per_block * 4)[:, None, None], offsets.shape)
    access = Access(wave.place, agents.reshape(-1), write=False, order=order)
    wave.shared.note(blocks.reshape(-1), offsets.reshape(-1), 16, access)
    elements = wave.shared.load(blocks, offsets, 16, size)
    tile = np.zeros((len(start), rows, depth), np.float32)
    flat = as_float32(kind, elements.reshape(len(groups), offsets.shape[1], -1))
    tile[live] = flat.transpose(0, 2, 1) if turned else flat
    return tile
