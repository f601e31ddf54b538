"""What the threads of a warp do together: shuffles, votes, reductions, and elections."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .errors import EmulationError
from .ptx import Instruction
from .wave import TYPES, UNSIGNED, Mask, Operands, Step, Wave, opcode, unknown

Array = NDArray[Any]

_LANES: Final = np.arange(32)[None, :]


def _sources(mode: str, offset: Array, clamp: Array) -> tuple[Array, Array]:
    """The lane that each lane reads, and whether that is in range."""
    segment, bound = (clamp >> 8) & 31, clamp & 31
    low = _LANES & segment
    high = low | (bound & ~segment & 31)
    if mode == "bfly":
        lane = _LANES ^ offset
        return lane, lane <= high
    if mode == "up":
        lane = _LANES - offset
        # The bound of a shift upward is its lowest lane.
        return lane, lane >= (low | (bound & ~segment & 31))
    if mode == "down":
        lane = _LANES + offset
        return lane, lane <= high
    lane = low | (offset & ~segment & 31)
    return lane, lane <= high


@opcode("shfl")
def _shuffle(instruction: Instruction, operands: Operands) -> Step:
    mode = instruction.parts[2]
    targets = [operands.target(one.strip()) for one in instruction.operands[0].split("|")]
    read, offset, clamp = (operands.source(one, "b32") for one in instruction.operands[1:4])
    fixed = not any(operands.is_register(one) for one in instruction.operands[2:4])

    def run(wave: Wave, mask: Mask) -> None:
        values = wave.warps(read(wave))
        if fixed:
            by, bound = offset(wave).astype(np.int64), clamp(wave).astype(np.int64)
        else:
            by = wave.warps(offset(wave)).astype(np.int64)
            bound = wave.warps(clamp(wave)).astype(np.int64)
        lane, inside = _sources(mode, by, bound)
        lane = np.where(inside, lane, _LANES)
        fixed_lane = lane.shape[0] == 1
        result = values[:, lane[0]] if fixed_lane else np.take_along_axis(values, lane, 1)
        targets[0](wave, wave.lanes(result), mask)
        if len(targets) > 1:
            targets[1](wave, wave.lanes(np.broadcast_to(inside, values.shape)), mask)

    return run


@opcode("vote")
def _vote(instruction: Instruction, operands: Operands) -> Step:
    target, text = instruction.operands[:2]
    flip = text.startswith("!")
    write, read = operands.target(target), operands.source(text.removeprefix("!"), "pred")
    mode = instruction.parts[2]
    powers = np.uint32(1) << _LANES.astype(np.uint32)

    def run(wave: Wave, mask: Mask) -> None:
        votes = wave.warps(read(wave) ^ flip)
        taking = np.ones((1, 32), bool) if mask is None else wave.warps(mask)
        if mode == "ballot":
            result = ((votes & taking) * powers).sum(1, dtype=np.uint32)
        elif mode == "all":
            result = (votes | ~taking).all(1)
        elif mode == "any":
            result = (votes & taking).any(1)
        else:
            result = (votes | ~taking).all(1) | ~(votes & taking).any(1)
        write(wave, wave.lanes(np.repeat(result, 32)), mask)

    return run


@opcode("activemask")
def _active(instruction: Instruction, operands: Operands) -> Step:
    write = operands.target(instruction.operands[0])
    powers = np.uint32(1) << _LANES.astype(np.uint32)

    def run(wave: Wave, mask: Mask) -> None:
        taking = wave.warps(np.ones((1, 1), bool) if mask is None else mask)
        result = (taking * powers).sum(1, dtype=np.uint32)
        write(wave, wave.lanes(np.repeat(result, 32)), mask)

    return run


_REDUCTIONS: Final[dict[str, Any]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@opcode("redux")
def _reduce(instruction: Instruction, operands: Operands) -> Step:
    kind, name = instruction.parts[-1], instruction.parts[2]
    if name not in _REDUCTIONS or kind not in TYPES:
        raise unknown(instruction)
    target, text = instruction.operands[:2]
    write, read = operands.target(target), operands.source(text, kind)
    function = _REDUCTIONS[name]
    if kind == "f32":
        function = np.fmin if name == "min" else np.fmax

    def run(wave: Wave, mask: Mask) -> None:
        values = wave.warps(read(wave))
        if mask is None:
            result = function.reduce(values, axis=1, dtype=values.dtype)
        else:
            result = np.array(
                [
                    function.reduce(row[taking], dtype=row.dtype) if taking.any() else 0
                    for row, taking in zip(values, wave.warps(mask), strict=True)
                ],
                values.dtype,
            )
        write(wave, wave.lanes(np.repeat(result, 32)).view(UNSIGNED[int(kind[1:])]), mask)

    return run


@opcode("elect")
def _elect(instruction: Instruction, operands: Operands) -> Step:
    first, _, second = instruction.operands[0].partition("|")
    write, elected = operands.target(first.strip()), operands.target(second.strip())

    def run(wave: Wave, mask: Mask) -> None:
        if mask is None:
            lane = np.zeros((1, 1), np.int64)
        else:
            lane = wave.lanes(np.repeat(wave.warps(mask).argmax(1), 32))
        write(wave, lane.astype(np.uint32), mask)
        elected(wave, np.broadcast_to(wave.lane == lane, (wave.blocks, wave.threads)), mask)

    return run


@opcode("fence", "membar", "nanosleep", "prefetch", "prefetchu", "discard", "setmaxnreg", "pragma")
def _nothing(instruction: Instruction, operands: Operands) -> Step:
    return lambda wave, mask: None


@opcode("griddepcontrol")
def _dependent(instruction: Instruction, operands: Operands) -> Step:
    if instruction.parts[1] == "launch_dependents":
        return lambda wave, mask: None

    def wait(wave: Wave, mask: Mask) -> None:
        wave.unsettled = None

    return wait


@opcode("trap", "brkpt")
def _trap(instruction: Instruction, operands: Operands) -> Step:
    def run(wave: Wave, mask: Mask) -> None:
        raise EmulationError("a trap")

    return run
