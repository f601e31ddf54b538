"""Shared memory of the blocks that run in lockstep, and the races on it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .errors import EmulationError
from .memory import POISON
from .ptx import Instruction

Array = NDArray[Any]

MANY: Final = 255
"""As the agent of a stamp: more than one warp has read."""

ATOMIC: Final = 254
"""As the agent of a stamp: atomic operations, which never race with each other."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is known to have happened before what, at one moment.

    `clock` counts the synchronizations of each block. Accesses up to `floor` came before a barrier
    of the whole block. `known[c, v, w]` is up to which clock agent v of block c has seen what agent
    w did; agents are the warps and, last, the unit that copies asynchronously.
    """

    clock: Array
    floor: Array
    known: Array | None = None


@dataclass(frozen=True, slots=True)
class Access:
    """Who accesses: `agent` (an array or one for all) by the instruction at `place`.

    For what was asked for earlier, `order` is what was known then, to `knower`.
    """

    place: int
    agent: Array | int
    write: bool
    order: Order | None = None
    knower: Array | int | None = None


class Shared:
    """Shared memory of `blocks` blocks, poisoned with NaN.

    `granule` is how many bytes one stamp of the last accesses stands for.
    """

    def __init__(
        self,
        blocks: int,
        num_bytes: int,
        warps: int,
        granule: int,
        instructions: tuple[Instruction, ...],
    ) -> None:
        self.num_bytes = num_bytes
        self.stride = -(-max(num_bytes, 16) // 128) * 128
        self.blocks, self.warps, self.granule = blocks, warps, granule
        self._data = np.full(blocks * self.stride, POISON, np.uint8)
        self._views: dict[tuple[int, int], Array] = {}
        self._instructions = instructions
        self._stamps = self.stride // granule
        self._written = np.zeros(blocks * self._stamps, np.int64)
        self._read = np.zeros(blocks * self._stamps, np.int64)
        self.order = Order(np.ones(blocks, np.int64), np.zeros(blocks, np.int64))

    # --- contents

    def load(self, blocks: Array, offsets: Array, num_bytes: int, element_bytes: int) -> Array:
        """`[..., num_bytes / element_bytes]` unsigned integers at offsets that were noted."""
        places = (blocks * self.stride + offsets) // num_bytes
        found: Array = self._view(num_bytes, element_bytes)[places]
        return found

    def store(self, blocks: Array, offsets: Array, values: Array) -> None:
        """Unsigned integers `[..., count]` to offsets that were noted."""
        num_bytes = values.shape[-1] * values.itemsize
        places = (blocks * self.stride + offsets) // num_bytes
        self._view(num_bytes, values.itemsize)[places] = values

    def _view(self, num_bytes: int, element_bytes: int) -> Array:
        view = self._views.get((num_bytes, element_bytes))
        if view is None:
            view = self._data.view(f"u{element_bytes}").reshape(-1, num_bytes // element_bytes)
            self._views[num_bytes, element_bytes] = view
        return view

    def _check(self, offsets: Array, num_bytes: int) -> None:
        if not offsets.size:
            return
        if offsets.min() < 0 or offsets.max() + num_bytes > self.num_bytes:
            bad = offsets.min() if offsets.min() < 0 else offsets.max()
            raise EmulationError(
                f"out of bounds: {num_bytes} bytes at {int(bad)} of shared memory, "
                f"which has {self.num_bytes} bytes"
            )
        if int(np.bitwise_or.reduce(offsets, axis=None)) & (num_bytes - 1):
            bad = offsets[offsets % num_bytes != 0]
            raise EmulationError(
                f"misaligned: {num_bytes} bytes at {int(bad.flat[0])} of shared memory"
            )

    # --- races

    def note(self, blocks: Array, offsets: Array, num_bytes: int, access: Access) -> None:
        """Check and record accesses, which are flat arrays; EmulationError where one is a race."""
        self._check(offsets, num_bytes)
        order = access.order or self.order
        places = blocks * self._stamps + offsets // self.granule
        agent = np.asarray(access.agent, np.int64)
        if num_bytes > self.granule:
            count = num_bytes // self.granule
            places = (places[:, None] + np.arange(count)).reshape(-1)
            blocks = np.repeat(blocks, count)
            agent = np.repeat(agent, count) if agent.ndim else agent
        limit = (order.floor[blocks] + 1) << 32
        wave = (blocks, limit, agent, offsets)
        self._compare(self._written[places], wave, access, "write")
        now = (self.order.clock[blocks] << 32) | (access.place << 8) | agent
        before = self._read[places]
        if access.write:
            self._compare(before, wave, access, "read")
            self._written[places] = now
            return
        fresh = before >= (self.order.floor[blocks] + 1) << 32
        shared = fresh & ((before & 255) != agent)
        # Warps that read a place in one instruction are many as well: the last one would hide them.
        self._read[places] = np.where(shared, now | MANY, now)
        if agent.ndim:
            other = (self._read[places] & 255) != agent
            if other.any():
                self._read[places[other]] |= MANY

    def _compare(
        self, stamps: Array, wave: tuple[Array, Array, Array, Array], access: Access, before: str
    ) -> None:
        blocks, limit, agent, offsets = wave
        fresh = stamps >= limit
        if not fresh.any():
            return
        others = stamps & 255
        suspect = np.flatnonzero(fresh & (others != agent))
        if not suspect.size:
            return
        order = access.order or self.order
        knower = agent if access.knower is None else np.asarray(access.knower, np.int64)
        if knower.ndim and knower.size != stamps.size:
            knower = np.repeat(knower, stamps.size // knower.size)
        if order.known is not None:
            # Most were seen by who asks; the others, and accesses of many, are looked at singly.
            asked = others[suspect]
            asking = np.broadcast_to(knower, stamps.shape)[suspect]
            usual = (asked <= self.warps) & (asking <= self.warps)
            asked, asking = np.minimum(asked, self.warps), np.minimum(asking, self.warps)
            seen = order.known[blocks[suspect], asking, asked]
            suspect = suspect[~usual | (seen < stamps[suspect] >> 32)]
        for place in suspect:
            me = int(knower[place] if knower.ndim else knower)
            block, other = int(blocks[place]), int(others[place])
            clock = int(stamps[place]) >> 32
            if other not in (ATOMIC, MANY) and other == me:
                continue
            if self._knows(order, block, me, other) >= clock:
                continue
            offset = int(offsets[place * len(offsets) // len(stamps)])
            first = self._instructions[(int(stamps[place]) >> 8) & 0xFFFFFF]
            mine = int(agent[place] if agent.ndim else agent)
            raise EmulationError(
                f"race: the {'write' if access.write else 'read'} by {self._name(mine)} of shared "
                f"memory at {offset} is not ordered after the {before} by {self._name(other)} "
                f"at {first.line or 'an unknown line'} ({first.text[:100]})"
            )

    def _knows(self, order: Order, block: int, me: int, other: int) -> int:
        """Up to which clock an agent has seen what another did."""
        floor = int(order.floor[block])
        if order.known is None or other == ATOMIC or me in (ATOMIC, MANY):
            return floor
        row = order.known[block, me]
        if other == MANY:
            return max(floor, int(np.delete(row[: self.warps], me).min(initial=1 << 40)))
        return max(floor, int(row[other]))

    def _name(self, agent: int) -> str:
        if agent == MANY:
            return "several warps"
        if agent == ATOMIC:
            return "an atomic operation"
        return "an asynchronous copy" if agent == self.warps else f"warp {agent}"

    # --- what orders accesses

    def barrier(self, blocks: Array | None) -> None:
        """A barrier of all threads: of all blocks, or of those in a mask."""
        clock, floor = self.order.clock, self.order.floor
        if blocks is None:
            known = None
            self.order = Order(clock + 1, clock.copy(), known)
            return
        known = self.order.known
        self.order = Order(clock + blocks, np.where(blocks, clock, floor), known)

    def join(self, block: int, warps: Array) -> None:
        """A barrier of some warps of one block."""
        known = self._known()
        row = known[block, warps].max(0)
        row[warps] = self.order.clock[block]
        known[block, warps] = row
        self._advance(block, known)

    def released(self, block: int, agent: int) -> Array:
        """What an agent has done and seen, for who waits for it."""
        known = self._known()
        row: Array = known[block, agent].copy()
        row[agent] = self.order.clock[block]
        self._advance(block, known)
        return row

    def acquire(self, block: int, warps: Array, released: Array) -> None:
        """Warps have waited for what was released."""
        known = self._known()
        known[block, warps] = np.maximum(known[block, warps], released)
        self._advance(block, known)

    def _known(self) -> Array:
        """A copy to be changed: orders that were kept stay as they are."""
        if self.order.known is not None:
            return self.order.known.copy()
        agents = self.warps + 1
        return np.broadcast_to(
            self.order.floor[:, None, None], (self.blocks, agents, agents)
        ).copy()

    def _advance(self, block: int, known: Array) -> None:
        clock = self.order.clock.copy()
        clock[block] += 1
        self.order = Order(clock, self.order.floor, known)
