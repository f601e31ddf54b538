"""Loads, stores and atomic operations, on parameters, global and shared memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .errors import EmulationError
from .ptx import Instruction, members
from .shared import ATOMIC, Access
from .wave import (
    PARAMETER_BASE,
    TYPES,
    UNSIGNED,
    Mask,
    Operands,
    Step,
    Wave,
    opcode,
    unknown,
)

Array = NDArray[Any]


def space_of(instruction: Instruction) -> str:
    """The space that an instruction accesses."""
    for part in instruction.parts[1:]:
        name = part.partition("::")[0]
        if name in ("global", "shared", "param"):
            if part not in ("global", "shared", "shared::cta", "param"):
                raise unknown(instruction)
            return name
    raise unknown(instruction)


def access_bytes(instruction: Instruction) -> tuple[int, int]:
    """The bytes of one element, and how many there are."""
    bits = int(re.sub(r"\D", "", instruction.parts[-1].removesuffix("x2")))
    count = next((int(p[1:]) for p in instruction.parts if re.match(r"^v\d$", p)), 1)
    return bits // 8, count


def settled(wave: Wave, addresses: Array, *, write: bool) -> None:
    """Refuse what a dependent launch may only do once it has waited for those before it."""
    if not wave.unsettled and not (write and wave.unsettled is not None):
        return
    assert wave.unsettled is not None
    touched = wave.memory.touched(addresses)
    early = touched if write else touched & wave.unsettled
    if early:
        name = min(one.name for one in early)
        kind = "written" if write else "read, which a launch before this one has written,"
        raise EmulationError(f"{name!r} is {kind} before griddepcontrol.wait")


@opcode("ld")
def _load(instruction: Instruction, operands: Operands) -> Step:
    space = space_of(instruction)
    if space == "param":
        return _load_parameter(instruction, operands)
    size, count = access_bytes(instruction)
    texts = members(instruction.operands[0])
    where = operands.address(instruction.operands[1], space)
    finish = [_finisher(operands, text, instruction.parts[-1]) for text in texts]

    def run(wave: Wave, mask: Mask) -> None:
        at = where(wave)
        if space == "shared":
            found = _load_shared(wave, at, mask, size, count)
        else:
            if mask is not None:
                at = _only(at, mask)
            if wave.unsettled:
                settled(wave, at, write=False)
            found = wave.memory.load(at, size * count, size)
            if wave.races is not None:
                _note_load(wave, at, mask, size * count, instruction.parts)
        for place, write in enumerate(finish):
            write(wave, found[..., place], mask)

    return run


def _note_load(wave: Wave, at: Array, mask: Mask, num_bytes: int, parts: tuple[str, ...]) -> None:
    """Look for races; loads that order others are never part of one."""
    assert wave.races is not None
    if mask is None and not {"acquire", "relaxed"} & set(parts):
        wave.races.note(wave, at, num_bytes, write=False)
        return
    chosen = np.ones((wave.blocks, wave.threads), bool) if mask is None else wave.full(mask)
    blocks = np.broadcast_to(wave.block, chosen.shape)[chosen]
    addresses = wave.full(at)[chosen]
    if "acquire" in parts:
        wave.races.synchronize(wave, addresses, blocks, parts)
    elif "relaxed" not in parts:
        wave.races.note_each(wave, addresses, blocks, num_bytes, write=False)


def _only(addresses: Array, mask: NDArray[np.bool_]) -> Array:
    """Addresses of a mask's threads; the others get one of these."""
    shape = np.broadcast_shapes(addresses.shape, mask.shape)
    addresses, mask = np.broadcast_to(addresses, shape), np.broadcast_to(mask, shape)
    spare = addresses.reshape(-1)[int(mask.reshape(-1).argmax())]
    return np.where(mask, addresses, spare)


def _load_shared(wave: Wave, at: Array, mask: Mask, size: int, count: int) -> Array:
    at = np.broadcast_to(at, (wave.blocks, wave.threads))
    blocks = np.broadcast_to(wave.block, at.shape)
    agents = np.broadcast_to(wave.warp, at.shape)
    if mask is None:
        wave.shared.note(
            blocks.reshape(-1), at.reshape(-1), size * count,
            Access(wave.place, agents.reshape(-1), write=False),
        )  # fmt: skip
        return wave.shared.load(blocks, at, size * count, size)
    chosen = np.broadcast_to(mask, at.shape)
    blocks, at, agents = blocks[chosen], at[chosen], agents[chosen]
    wave.shared.note(blocks, at, size * count, Access(wave.place, agents, write=False))
    found = np.zeros((*chosen.shape, count), UNSIGNED[8 * size])
    found[chosen] = wave.shared.load(blocks, at, size * count, size)
    return found


def _finisher(operands: Operands, text: str, kind: str) -> Callable[[Wave, Array, Mask], None]:
    target = operands.target(text)
    if kind[0] != "s" or text == "_" or operands.width(text) == int(kind[1:]):
        return target
    narrow, wide = TYPES[kind], TYPES[f"s{operands.width(text)}"]
    return lambda wave, values, mask: target(wave, values.view(narrow).astype(wide), mask)


def _load_parameter(instruction: Instruction, operands: Operands) -> Step:
    size, count = access_bytes(instruction)
    found = re.match(r"\[\s*([\w$]+)\s*(?:\+\s*(\d+))?\s*\]", instruction.operands[1])
    if found is None:
        raise unknown(instruction)
    parameter = next((p for p in operands.module.parameters if p.name == found[1]), None)
    if parameter is None:
        raise EmulationError(f"there is no parameter {found[1]!r}")
    offset = parameter.offset + int(found[2] or 0)
    texts = members(instruction.operands[0])
    finish = [_finisher(operands, text, instruction.parts[-1]) for text in texts]

    def run(wave: Wave, mask: Mask) -> None:
        for place, write in enumerate(finish):
            begin = offset + place * size
            raw = np.frombuffer(wave.parameters[begin : begin + size], f"u{size}")
            write(wave, raw.reshape(1, 1), mask)

    assert len(texts) == count
    return run


@opcode("st")
def _store(instruction: Instruction, operands: Operands) -> Step:
    space = space_of(instruction)
    size, _ = access_bytes(instruction)
    where = operands.address(instruction.operands[0], space)
    sources = operands.sources(instruction.operands[1], f"b{8 * size}")

    def run(wave: Wave, mask: Mask) -> None:
        at = where(wave)
        values = [source(wave) for source in sources]
        shape = np.broadcast_shapes(at.shape, *(value.shape for value in values))
        if mask is not None:
            shape = np.broadcast_shapes(shape, mask.shape)
        if space == "shared":
            shape = (wave.blocks, wave.threads)
        at = np.broadcast_to(at, shape)
        if len(values) == 1:
            stacked = np.broadcast_to(values[0], shape)[..., None]
        else:
            stacked = np.stack([np.broadcast_to(value, shape) for value in values], -1)
        chosen = None if mask is None else np.broadcast_to(mask, shape)
        if chosen is not None:
            at, stacked = at[chosen], stacked[chosen]
        if space == "global":
            if wave.unsettled is not None:
                settled(wave, at, write=True)
            wave.memory.store(at, stacked)
            if wave.races is not None:
                _note_store(wave, at, chosen, stacked.shape[-1] * size, instruction.parts)
            return
        _store_shared(wave, at, stacked, chosen)

    return run


def _note_store(
    wave: Wave, at: Array, chosen: Mask, num_bytes: int, parts: tuple[str, ...]
) -> None:
    """Look for races; stores that order others are never part of one."""
    assert wave.races is not None
    if chosen is None:
        blocks = np.broadcast_to(wave.block, (wave.blocks, at.shape[-1]))
        at = np.broadcast_to(at, blocks.shape).reshape(-1)
        blocks = blocks.reshape(-1)
    else:
        whole = np.broadcast_shapes(chosen.shape, (wave.blocks, 1))
        blocks = np.broadcast_to(wave.block, whole)[np.broadcast_to(chosen, whole)]
        if whole != chosen.shape:  # one row of addresses stands for those of all blocks
            at = np.broadcast_to(at, (wave.blocks, len(at))).reshape(-1)
    if "release" in parts:
        wave.races.synchronize(wave, at, blocks, parts)
    elif "relaxed" not in parts:
        wave.races.note_each(wave, at, blocks, num_bytes, write=True)


def _store_shared(wave: Wave, at: Array, values: Array, chosen: Mask) -> None:
    shape = (wave.blocks, wave.threads)
    blocks, agents = np.broadcast_to(wave.block, shape), np.broadcast_to(wave.warp, shape)
    if chosen is not None:
        blocks, agents = blocks[chosen], agents[chosen]
    num_bytes = values.shape[-1] * values.itemsize
    access = Access(wave.place, agents.reshape(-1), write=True)
    wave.shared.note(blocks.reshape(-1), at.reshape(-1), num_bytes, access)
    wave.shared.store(blocks, at, values)


_UPDATES: Final[dict[str, Callable[[Array, Array], Array]]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "inc": lambda old, most: np.where(old >= most, 0, old + 1).astype(old.dtype),
    "dec": lambda old, most: np.where((old == 0) | (old > most), most, old - 1).astype(old.dtype),
}


@opcode("atom", "red")
def _atomic(instruction: Instruction, operands: Operands) -> Step:
    space, kind = space_of(instruction), instruction.parts[-1]
    name = next((part for part in instruction.parts if part in _UPDATES or part == "cas"), None)
    if name is None or kind not in TYPES:
        raise unknown(instruction)
    texts = list(instruction.operands)
    write = operands.target(texts.pop(0)) if instruction.parts[0] == "atom" else None
    where = operands.address(texts[0], space)
    sources = [operands.source(members(one)[0], kind) for one in texts[1:]]

    def run(wave: Wave, mask: Mask) -> None:
        chosen = np.ones((wave.blocks, wave.threads), bool) if mask is None else wave.full(mask)
        at = wave.full(where(wave))[chosen]
        values = [wave.full(source(wave))[chosen] for source in sources]
        blocks = np.broadcast_to(wave.block, chosen.shape)[chosen]
        size = values[0].itemsize
        if space == "shared":
            wave.shared.note(blocks, at, size, Access(wave.place, ATOMIC, write=True))
        elif wave.unsettled is not None:
            settled(wave, at, write=True)
        if space == "global" and wave.races is not None:
            wave.races.synchronize(wave, at, blocks, instruction.parts)
        olds = _update(wave, space, (blocks, at), name, values)
        wave.progress += 1
        if write is not None:
            found: Array = np.zeros(chosen.shape, f"u{size}")
            found[chosen] = olds
            write(wave, found, mask)

    return run


def _update(
    wave: Wave, space: str, where: tuple[Array, Array], name: str, values: list[Array]
) -> Array:
    """One after the other, as a device may: the values before."""
    blocks, at = where
    dtype = values[0].dtype
    if name == "add" and space == "global" and dtype.kind in "iu":
        return _added(wave, at, values[0])
    olds = np.empty(len(at), f"u{dtype.itemsize}")
    for place in range(len(at)):
        one = slice(place, place + 1)
        if space == "shared":
            bits = wave.shared.load(blocks[one], at[one], dtype.itemsize, dtype.itemsize)
        else:
            bits = wave.memory.load(at[one], dtype.itemsize, dtype.itemsize)
        old = bits[:, 0].view(dtype)
        if name == "cas":
            new = np.where(old == values[0][one], values[1][one], old)
        else:
            new = _UPDATES[name](old, values[0][one])
        olds[place] = bits[0, 0]
        stored = np.ascontiguousarray(new).view(bits.dtype)[:, None]
        if space == "shared":
            wave.shared.store(blocks[one], at[one], stored)
        else:
            wave.memory.store(at[one], stored)
    return olds


def _added(wave: Wave, at: Array, values: Array) -> Array:
    """The same for integers that are added, whose sums do not depend on the order: all at once."""
    unsigned = values.view(f"u{values.itemsize}")
    order = np.argsort(at, kind="stable")
    places, firsts = np.unique(at[order], return_index=True)
    before = wave.memory.load(places, values.itemsize, values.itemsize)[:, 0]
    sums = np.cumsum(unsigned[order], dtype=unsigned.dtype)
    run = sums - unsigned[order]
    counts = np.diff([*firsts, len(at)])
    olds = np.empty_like(unsigned)
    olds[order] = np.repeat(before - run[firsts], counts) + run
    ends = firsts + counts - 1
    wave.memory.store(places, (before + (sums[ends] - run[firsts]))[:, None])
    return olds


def descriptor_at(wave: Wave, address: int) -> bytes:
    """The 128 bytes of a descriptor, which is a parameter."""
    offset = address - PARAMETER_BASE
    if not 0 <= offset <= len(wave.parameters) - 128 or offset % 64:
        raise EmulationError(f"no descriptor is at {address:#x}")
    return wave.parameters[offset : offset + 128]


def chosen_threads(wave: Wave, mask: Mask) -> Array:
    """The numbers `block * threads + thread` of a mask's threads."""
    if mask is None:
        return np.arange(wave.blocks * wave.threads)
    return np.flatnonzero(wave.full(mask))
