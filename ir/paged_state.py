"""What a lowered program keeps between steps, and the arrays of one step, as torch tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import ProgramError
from .resources import KvGroup, Resource, element_type
from .row_codes import ROW_CODES, RowCodes
from .torch_types import to_torch

if TYPE_CHECKING:
    import torch


@dataclass(slots=True)
class PagedState:
    """Paged KV of every cache, and where the step's tokens stand (see `docs/design/step.md`).

    A cache goes by the number of the layer that it is of; other layers may read it too.
    `keys[cache]` is `[num_blocks, block_size, G, D]`, `values[cache]` the same with `Dv`; both
    are written in place. Caches of codes (`codes[cache]` says which) have their scales in
    `key_scales[cache]` and `value_scales[cache]`, `[num_blocks, block_size, G]`.
    `block_tables[group]` is `[B, W]`, `slots[group]` `[T]`; the arrays are integer tensors. Block 0
    is the null block: never written, never read.
    """

    keys: dict[int, torch.Tensor]
    values: dict[int, torch.Tensor]
    positions: torch.Tensor
    query_starts: torch.Tensor
    context_lengths: torch.Tensor
    block_tables: Mapping[str, torch.Tensor] = field(default_factory=dict)
    slots: Mapping[str, torch.Tensor] = field(default_factory=dict)
    key_scales: dict[int, torch.Tensor] = field(default_factory=dict)
    value_scales: dict[int, torch.Tensor] = field(default_factory=dict)
    codes: dict[int, RowCodes] = field(default_factory=dict)

    @classmethod
    def allocate(
        cls, groups: Iterable[Resource], num_blocks: int, dtype: str | None = None
    ) -> PagedState:
        """Zeroed storage of `num_blocks` blocks for every cache of the groups, with no step yet.

        `dtype` replaces that of the groups (as the interpreter's override does for values).
        """
        import torch

        none = torch.zeros(0, dtype=torch.int64)
        state = cls({}, {}, none, torch.zeros(1, dtype=torch.int64), none)
        for group in groups:
            state.add(group, num_blocks, dtype)
        return state

    def add(self, group: Resource, num_blocks: int, dtype: str | None = None) -> None:
        """Zeroed storage for the layers of one more group; ProgramError where it is no KV group."""
        import torch

        if not isinstance(group, KvGroup):
            raise ProgramError(f"ops on {group.kind} groups are not defined", where=group.name)
        name = dtype or group.dtype
        kind = to_torch(element_type(name))
        shape = (num_blocks, group.block_size, group.num_kv_heads)
        for layer in group.layers:
            self.keys[layer] = torch.zeros(*shape, group.key_head_dim, dtype=kind)
            self.values[layer] = torch.zeros(*shape, group.value_head_dim, dtype=kind)
            if name in ROW_CODES:
                self.codes[layer] = ROW_CODES[name]
                self.key_scales[layer] = torch.zeros(*shape)
                self.value_scales[layer] = torch.zeros(*shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of all blocks."""
        parts = (self.keys, self.values, self.key_scales, self.value_scales)
        return sum(one.nbytes for part in parts for one in part.values())

    def set_step(
        self,
        positions: torch.Tensor,
        query_starts: torch.Tensor,
        context_lengths: torch.Tensor,
        block_tables: Mapping[str, torch.Tensor],
    ) -> None:
        """Take the arrays of one step; slots follow from the positions and the block tables."""
        self.positions = positions.long()
        self.query_starts = query_starts.long()
        self.context_lengths = context_lengths.long()
        self.block_tables = {name: table.long() for name, table in block_tables.items()}
        self.slots = {}

    def slots_of(self, group: str, cache: int) -> torch.Tensor:
        """Where each token's KV goes: `block * block_size + position % block_size`, `[T]`."""
        import torch

        given = self.slots.get(group)
        if given is not None:
            return given.long()
        block_size = self.keys[cache].shape[1]
        table = self.block_tables[group]
        counts = self.query_starts[1:] - self.query_starts[:-1]
        rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
        blocks = table[rows, self.positions // block_size]
        return blocks * block_size + self.positions % block_size

    def write(self, group: str, cache: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store the step's keys `[T, G, D]` and values `[T, G, Dv]`."""
        slots = self.slots_of(group, cache)
        stores = (self.keys, self.key_scales, k), (self.values, self.value_scales, v)
        for storage, scales, rows in stores:
            if cache in scales:
                rows, row_scales = self.codes[cache].rows(rows)
                _by_slot(scales[cache])[slots] = row_scales.float()
            _by_slot(storage[cache])[slots] = rows.to(storage[cache].dtype)

    def read(
        self, group: str, cache: int, sequence: int, start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys `[C, G, D]` and values of one sequence from position `start` to its end.

        Codes come multiplied by their scales, in float32.
        """
        import torch

        block_size = self.keys[cache].shape[1]
        end = int(self.context_lengths[sequence])
        places = torch.arange(start, end)
        table = self.block_tables[group][sequence]
        slots = table[places // block_size].long() * block_size + places % block_size
        keys, values = _by_slot(self.keys[cache])[slots], _by_slot(self.values[cache])[slots]
        if cache in self.key_scales:
            codes, unit = self.codes[cache], _by_slot(self.key_scales[cache])[slots]
            keys = codes.decode(keys, unit, 0, torch.float32)
            unit = _by_slot(self.value_scales[cache])[slots]
            values = codes.decode(values, unit, 0, torch.float32)
        return keys, values

    def copy_block(self, cache: int, source: int, destination: int) -> None:
        """Let block `destination` of a cache hold what `source` does."""
        for stores in self._stores():
            if cache in stores:
                stores[cache][destination] = stores[cache][source]

    def clear(self) -> None:
        """Give the storage back."""
        for stores in self._stores():
            stores.clear()
        self.codes.clear()

    def _stores(self) -> tuple[dict[int, torch.Tensor], ...]:
        return self.keys, self.values, self.key_scales, self.value_scales


def _by_slot(storage: torch.Tensor) -> torch.Tensor:
    """Storage `[num_blocks, block_size, ...]` with one dimension of slots, `[N, ...]`."""
    return storage.view(-1, *storage.shape[2:])
