"""Asynchronous copies, by threads (cp.async) and by the tensor memory accelerator."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infc.runtime.executors.gpu.driver import MatrixMap

from .access import chosen_threads, descriptor_at, settled
from .descriptors import ELEMENT_BYTES, decode
from .errors import EmulationError
from .groups import groups_of
from .mbarriers import Mbarrier, barrier_at
from .ptx import Instruction
from .shared import Access, Order
from .warpgroups import swizzled
from .wave import Mask, Operands, Source, Step, Wave, opcode, unknown

Array = NDArray[Any]


@opcode("cp")
def _copy(instruction: Instruction, operands: Operands) -> Step:
    parts = instruction.parts
    if parts[1] != "async" or "reduce" in parts:
        raise unknown(instruction)
    kind = "bulk" if "bulk" in parts else "copies"
    if parts[-1] == "commit_group":
        return lambda wave, mask: groups_of(wave, kind).commit(wave)
    if "wait_group" in parts:
        keep = int(instruction.operands[0], 0)
        return lambda wave, mask: groups_of(wave, kind).wait(wave, keep)
    if "wait_all" in parts:
        return _wait_for_all
    if kind == "copies":
        return _copy_by_threads(instruction, operands)
    if "tensor" not in parts:
        raise unknown(instruction)
    dimensions = next((int(p[0]) for p in parts if re.match(r"^\dd$", p)), 0)
    if "bulk_group" in parts:
        return _store_box(instruction, operands, dimensions)
    if any(part.startswith("multicast") for part in parts) or not dimensions:
        raise unknown(instruction)
    return _load_box(instruction, operands, dimensions)


def _wait_for_all(wave: Wave, mask: Mask) -> None:
    groups_of(wave, "copies").commit(wave)
    groups_of(wave, "copies").wait(wave, 0)


def _copy_by_threads(instruction: Instruction, operands: Operands) -> Step:
    target = operands.address(instruction.operands[0], "shared")
    source = operands.address(instruction.operands[1], "global")
    size = int(instruction.operands[2], 0)
    rest = instruction.operands[3:4]
    used = operands.source(rest[0] if rest else str(size), "u32")

    def run(wave: Wave, mask: Mask) -> None:
        threads = chosen_threads(wave, mask)
        blocks, lanes = threads // wave.threads, threads % wave.threads
        to = wave.full(target(wave)).reshape(-1)[threads]
        at = wave.full(source(wave)).reshape(-1)[threads]
        count = wave.full(used(wave)).reshape(-1)[threads].astype(np.int64)
        whole = count == size
        if not whole.all() and (count[~whole] > 0).any():
            raise EmulationError(f"a copy of a part of {size} bytes is not modelled")
        wave.memory.check(at[whole], size)
        if wave.unsettled:
            settled(wave, at[whole], write=False)
        if wave.races is not None:
            wave.races.note_each(wave, at[whole], blocks[whole], size, write=False)
        access = Access(wave.place, lanes // 32, write=True, order=wave.shared.order)

        def job(landing: Mask) -> None:
            values = np.zeros((len(to), size // 4), np.uint32)
            values[whole] = wave.memory.load(at[whole], size, 4)
            if landing is None:
                wave.shared.note(blocks, to, size, access)
                wave.shared.store(blocks, to, values)
                return
            some = wave.full(landing).reshape(-1)[threads]
            part = replace(access, agent=lanes[some] // 32)
            wave.shared.note(blocks[some], to[some], size, part)
            wave.shared.store(blocks[some], to[some], values[some])

        groups_of(wave, "copies").add(wave, job)

    return run


def _box_operand(text: str, operands: Operands) -> tuple[Source, list[Source]]:
    """The descriptor's address and the coordinates, innermost first."""
    found = re.match(r"\[\s*([%\w$@#]+)\s*,\s*\{(.*)\}\s*\]", text)
    if found is None:
        raise EmulationError(f"the operand {text!r} is not known")
    coordinates = [operands.source(one.strip(), "s32") for one in found[2].split(",")]
    return operands.source(found[1], "u64"), coordinates


def _load_box(instruction: Instruction, operands: Operands, dimensions: int) -> Step:
    target = operands.address(instruction.operands[0], "shared")
    where, coordinates = _box_operand(instruction.operands[1], operands)
    barrier = operands.address(instruction.operands[2], "shared")

    def run(wave: Wave, mask: Mask) -> None:
        sources = (target, where, barrier, *coordinates)
        flat = [wave.full(source(wave)).reshape(-1) for source in sources]
        for thread in chosen_threads(wave, mask):
            to, at, bar, *place = (int(values[thread]) for values in flat)
            block = int(thread) // wave.threads
            matrix = decode(descriptor_at(wave, at))
            if len(matrix.box) != dimensions:
                raise EmulationError(f"the descriptor has {len(matrix.box)} dimensions")
            warp = int(thread) % wave.threads // 32
            order = wave.shared.order
            job = (wave.place, _landing(wave, matrix, (block, to), place[::-1], (warp, order)))
            barrier_at(wave, block, bar).jobs.append(job)

    return run


def _landing(
    wave: Wave,
    matrix: MatrixMap,
    where: tuple[int, int],
    place: list[int],
    asked: tuple[int, Order],
) -> Any:
    block, to = where
    warp, order = asked
    size = ELEMENT_BYTES[matrix.dtype]
    if to % 128:
        raise EmulationError(f"misaligned: a box goes to {to} of shared memory, not to 128 bytes")
    addresses, inside = _elements(matrix, place)
    if inside.any():
        wave.memory.check(addresses[inside], size)
        if wave.unsettled:
            settled(wave, addresses[inside], write=False)
        if wave.races is not None:
            blocks = np.full(int(inside.sum()), block)
            wave.races.note_each(wave, addresses[inside], blocks, size, write=False)

    def job(barrier: Mbarrier) -> None:
        values = np.zeros(inside.size, f"u{size}")
        if inside.any():
            values[inside] = wave.memory.load(addresses[inside], size, size)[:, 0]
        chunks = np.ascontiguousarray(values).view(f"u{size}").reshape(-1, 16 // size)
        offsets = swizzled(to + 16 * np.arange(len(chunks)), matrix.swizzle_bytes)
        blocks = np.full(len(chunks), block)
        access = Access(wave.place, wave.shared.warps, write=True, order=order, knower=warp)
        wave.shared.note(blocks, offsets, 16, access)
        wave.shared.store(blocks, offsets, chunks)
        barrier.missing_bytes -= values.nbytes

    return job


def _elements(matrix: MatrixMap, place: list[int]) -> tuple[Array, Array]:
    """The address of each element of a box, and whether it lies in the matrix."""
    size = ELEMENT_BYTES[matrix.dtype]
    at, inside = np.zeros((), np.int64), np.ones((), bool)
    for first, count, length in zip(place, matrix.box, matrix.shape, strict=True):
        index = first + np.arange(count)
        inside = inside[..., None] & (index >= 0) & (index < length)
        at = at[..., None] * length + index
    flat = at.reshape(-1) * size + matrix.address
    return flat.astype(np.uint64), inside.reshape(-1)


def _store_box(instruction: Instruction, operands: Operands, dimensions: int) -> Step:
    where, coordinates = _box_operand(instruction.operands[0], operands)
    source = operands.address(instruction.operands[1], "shared")

    def run(wave: Wave, mask: Mask) -> None:
        flat = [wave.full(one(wave)).reshape(-1) for one in (source, where, *coordinates)]
        for thread in chosen_threads(wave, mask):
            at, descriptor, *place = (int(values[thread]) for values in flat)
            matrix = decode(descriptor_at(wave, descriptor))
            if len(matrix.box) != dimensions:
                raise EmulationError(f"the descriptor has {len(matrix.box)} dimensions")
            warp = int(thread) % wave.threads // 32
            groups_of(wave, "bulk").add(
                wave, _leaving(wave, matrix, (int(thread), at), place[::-1], warp)
            )

    return run


def _leaving(
    wave: Wave, matrix: MatrixMap, where: tuple[int, int], place: list[int], warp: int
) -> Any:
    thread, at = where
    block = thread // wave.threads
    size = ELEMENT_BYTES[matrix.dtype]
    addresses, inside = _elements(matrix, place)
    wave.memory.check(addresses[inside], size, write=True)
    if wave.unsettled is not None:
        settled(wave, addresses[inside], write=True)
    order = wave.shared.order

    def job(landing: Mask) -> None:
        if landing is not None and not wave.full(landing).reshape(-1)[thread]:
            return
        count = inside.size * size // 16
        offsets = swizzled(at + 16 * np.arange(count), matrix.swizzle_bytes)
        blocks = np.full(count, block)
        access = Access(wave.place, warp, write=False, order=order)
        wave.shared.note(blocks, offsets, 16, access)
        values = wave.shared.load(blocks, offsets, 16, size).reshape(-1)
        wave.memory.store(addresses[inside], values[inside][:, None])
        if wave.races is not None:
            blocks = np.full(int(inside.sum()), block)
            wave.races.note_each(wave, addresses[inside], blocks, size, write=True)

    return job
