"""What a step takes of a device's memory, and where launches find it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from ....ir.errors import ArtifactError, CapacityError
from ....ir.launches import LaunchPlan, Pointer
from ....ir.manifest import CompiledProgram
from ....ir.shapes import parse_type
from ....ir.sizes import format_size
from .arrays import GROWING, greatest_sizes, layouts
from .driver import Driver
from .staging import GrowingArray
from .tables import DeviceTable
from .weights import DeviceWeights

_GROWING_BYTES: Final = 64 << 10


def output_bytes(program: CompiledProgram) -> dict[str, int]:
    """Bytes of each array that a step returns, at its greatest sizes."""
    sizes = greatest_sizes(program)
    return {name: parse_type(kind).num_bytes(sizes) for name, kind in program.outputs.items()}


def table_widths(program: CompiledProgram) -> dict[str, int]:
    """Blocks of a sequence in the longest context, for each group."""
    longest = program.limits.max_context
    return {group.name: -(-longest // group.block_size) for group in program.resources}


def step_bytes(program: CompiledProgram) -> int:
    """Bytes of the arrays that a step reads and returns, on the device."""
    sizes = greatest_sizes(program)
    tables = sum(4 * sizes["B"] * width for width in table_widths(program).values())
    growing = len(GROWING) + len(program.resources)
    returned = sum(output_bytes(program).values()) + 4 * sizes["D"]
    return layouts(program).of(sizes).num_bytes + tables + growing * _GROWING_BYTES + returned


class DeviceMemory:
    """All that an executor allocates, and the addresses of what launches name."""

    def __init__(
        self,
        driver: Driver,
        plan: LaunchPlan,
        program: CompiledProgram,
        weights: DeviceWeights,
        num_blocks: Sequence[int],
    ) -> None:
        self._driver, self.weights = driver, weights
        self.layouts = layouts(program)
        sizes = greatest_sizes(program)
        pools = {
            group.name: count * group.bytes_per_block()
            for group, count in zip(program.resources, num_blocks, strict=True)
        }
        arena = max(plan.arena_bytes, program.arena_bytes)
        self.num_bytes = weights.num_bytes + arena + sum(pools.values()) + step_bytes(program)
        _check_room(
            driver,
            {
                "weights": weights.num_bytes,
                "KV cache": sum(pools.values()),
                "one step": arena + step_bytes(program),
            },
        )
        self.arena = driver.allocate(max(1, arena), "the arena of a step")
        self.pools = {
            name: driver.allocate(max(1, size), f"the KV cache, group {name}")
            for name, size in pools.items()
        }
        self.packed_bytes = self.layouts.of(sizes).num_bytes
        self.packed = driver.allocate(max(1, self.packed_bytes), "the arrays of a step")
        self.tables = {
            group.name: _table(driver, plan.table_width[group.name], sizes["B"], group.name)
            for group in program.resources
        }
        names = [*GROWING, *(f"block_copies:{group.name}" for group in program.resources)]
        self.growing = {name: GrowingArray(driver, name, _GROWING_BYTES) for name in names}
        self.outputs = {
            name: driver.allocate(max(1, size), f"the output {name}")
            for name, size in output_bytes(program).items()
        }
        self.tokens = driver.allocate(4 * sizes["D"], "the tokens of a step")

    def fixed(self, pointer: Pointer) -> int | None:
        """The address of what never moves; None for packed arrays and those that grow.

        ArtifactError for what there is not.
        """
        found: int | None
        match pointer.space:
            case "arena":
                return self.arena
            case "weight":
                found = self.weights.address(pointer.name)
            case "state":
                found = self.pools.get(pointer.name)
            case "output":
                found = self.tokens if pointer.name == "tokens" else self.outputs.get(pointer.name)
            case "step":
                if pointer.name == "tokens_before":
                    return self.tokens
                kind, _, group = pointer.name.partition(":")
                if kind != "block_table":
                    return None if self._is_array(pointer.name) else _missing(pointer)
                found = self.tables[group].address if group in self.tables else None
        return _missing(pointer) if found is None else found

    def grown(self, name: str) -> int | None:
        """Where an array that grows lies now; None for the others."""
        found = self.growing.get(name)
        return None if found is None else found.address

    def _is_array(self, name: str) -> bool:
        return name in self.growing or any(one.name == name for one in self.layouts.arrays)


def _missing(pointer: Pointer) -> int:
    raise ArtifactError(
        f"a launch names {pointer.name!r} of {pointer.space}, which the program does not have",
        hint="the artifact is damaged: compile it again",
    )


def _table(driver: Driver, width: int, rows: int, group: str) -> DeviceTable:
    address = driver.allocate(max(1, 4 * rows * width), f"the block table, group {group}")
    return DeviceTable(address, rows, width)


def _check_room(driver: Driver, parts: Mapping[str, int]) -> None:
    """CapacityError, before anything is read, where all of it does not fit."""
    wanted, free = sum(parts.values()), driver.device.free_bytes
    if wanted > free:
        told = ", ".join(f"{name} {format_size(size)}" for name, size in parts.items())
        raise CapacityError(
            f"{driver.device.name} has {format_size(free)} of memory free, and this takes"
            f" {format_size(wanted)}: {told}",
            hint="lower kv_memory (--kv-memory, or kv_cache.memory in the recipe), or end what else"
            " uses the GPU",
        )
