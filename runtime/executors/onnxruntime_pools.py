"""Memory for keys and values of models in ONNX: what a step is bound to, and what it is told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from ...ir.errors import ArtifactError
from ...ir.resources import KvGroup
from ...ir.types import DType
from ..scheduling.step import Step
from .onnxruntime_feeds import Pieces, padded_rows, paged_keys, slot_rows

_ELEMENT_TYPES: Final[dict[DType, tuple[Any, int, str]]] = {
    DType.F32: (np.float32, 1, "tensor(float)"),
    DType.F16: (np.uint16, 10, "tensor(float16)"),
    DType.BF16: (np.uint16, 16, "tensor(bfloat16)"),
}
"""What holds keys and values in numpy, and the number and name that ONNX has for their type."""

_MOST_VIEWS: Final = 64
"""Ranges of slots whose bindings are kept."""

Feeds = dict[str, NDArray[Any]]

Kind = tuple[str, tuple[int | None, ...]]
"""The type of an input in ONNX, and its dimensions: None for one that differs between steps."""

_ROWS: Final[dict[str, Kind]] = {
    "row_of_padded": ("tensor(int64)", (None, None)),
    "padded_of_row": ("tensor(int64)", (None,)),
}
_PAGED: Final[dict[str, Kind]] = {
    "slots": ("tensor(int64)", (None, 1)),
    "key_slots": ("tensor(int64)", (None, None)),
    "key_positions": ("tensor(int64)", (None, None)),
}
_SLOTS: Final[dict[str, Kind]] = {
    **_ROWS,
    "write_at": ("tensor(int64)", (None,)),
    "lengths": ("tensor(int64)", (None,)),
    "key_count": ("tensor(int64)", (1,)),
}
_GROUPED: Final[dict[str, Kind]] = {
    **_SLOTS,
    "seqlens_k": ("tensor(int32)", (None,)),
    "query_seqlens": ("tensor(int32)", (None,)),
    "total_length": ("tensor(int32)", ()),
}


class Pools(ABC):
    """Zeroed arrays, one for the keys and one for the values of each layer.

    Their memory is only taken where something is written.
    """

    def __init__(self, groups: Sequence[KvGroup], counts: Sequence[int]) -> None:
        self.groups = tuple(groups)
        # The most tokens of each block that were ever written.
        self.written = [np.zeros(count, np.int64) for count in counts]
        self.arrays: dict[str, NDArray[Any]] = {}
        for group, count in zip(groups, counts, strict=True):
            kind = _ELEMENT_TYPES[DType(group.dtype)][0]
            for layer in group.layers:
                for part, size in (("key", group.key_head_dim), ("value", group.value_head_dim)):
                    self.arrays[f"{layer}.{part}"] = np.zeros(self.shape(group, count, size), kind)

    @abstractmethod
    def shape(self, group: KvGroup, count: int, size: int) -> tuple[int, ...]:
        """The shape of an array of so many blocks, for heads of a size."""

    @abstractmethod
    def feeds(self, step: Step, binding: Any) -> Feeds:
        """Bind what the step reads and writes; the inputs that say where."""

    @abstractmethod
    def takes(self) -> dict[str, Kind]:
        """The inputs of a model that say where."""

    def described(self) -> Iterator[tuple[str, str, NDArray[Any]]]:
        """Layer and part of each array, the type of its elements in ONNX, and the array."""
        for group in self.groups:
            kind = _ELEMENT_TYPES[DType(group.dtype)][2]
            for layer in group.layers:
                for part in ("key", "value"):
                    name = f"{layer}.{part}"
                    yield name, kind, self.arrays[name]

    def blocks(self, group: KvGroup, array: NDArray[Any]) -> NDArray[Any]:
        """The array with one block in each place of its first dimension."""
        return array

    def copy(self, step: Step) -> None:
        """Copy the blocks that the step wants copied, before it writes any."""
        for group, copies in zip(self.groups, step.block_copies, strict=True):
            for source, destination in copies.tolist():
                self.copy_block(group, source, destination)

    def copy_block(self, group: KvGroup, source: int, destination: int) -> None:
        """Let a block hold what another does, in all layers."""
        for layer in group.layers:
            for part in ("key", "value"):
                blocks = self.blocks(group, self.arrays[f"{layer}.{part}"])
                blocks[destination] = blocks[source]

    def bound(self, group: KvGroup, array: NDArray[Any]) -> Any:
        """An array as onnxruntime takes it; no byte is copied."""
        number = _ELEMENT_TYPES[DType(group.dtype)][1]
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, number)

    def note(self, step: Step) -> None:
        """Note which slots a step writes."""
        for group, slots, written in zip(self.groups, step.slots, self.written, strict=True):
            np.maximum.at(written, slots // group.block_size, slots % group.block_size + 1)

    @property
    def touched_bytes(self) -> int:
        """Bytes that steps have written at least."""
        return sum(
            int(written.sum()) * group.bytes_per_block() // group.block_size
            for group, written in zip(self.groups, self.written, strict=True)
        )

    def clear(self) -> None:
        """Give the memory back."""
        self.arrays.clear()
        self.written = [np.zeros(0, np.int64) for _ in self.groups]


class PagedPools(Pools):
    """Rows of heads, one for each slot of a block; all of them are bound, once."""

    _is_bound = False

    def shape(self, group: KvGroup, count: int, size: int) -> tuple[int, ...]:
        return count * group.block_size, group.num_kv_heads * size

    def blocks(self, group: KvGroup, array: NDArray[Any]) -> NDArray[Any]:
        return array.reshape(-1, group.block_size, array.shape[-1])

    def takes(self) -> dict[str, Kind]:
        return _ROWS | of_groups(self.groups, _PAGED) if self.groups else {}

    def feeds(self, step: Step, binding: Any) -> Feeds:
        if not self.groups:
            return {}
        if not self._is_bound:
            for group in self.groups:
                for layer in group.layers:
                    for part in ("key", "value"):
                        name = f"{layer}.{part}"
                        bind(binding, name, self.bound(group, self.arrays[name]))
            self._is_bound = True
        pieces = Pieces.of(step)
        return {**padded_rows(pieces), **paged_keys(step, self.groups, pieces)}


class SlotPools(Pools):
    """A slot for each sequence, whose number is that of its block; a step is bound to those
    between the first and the last of its sequences."""

    def __init__(self, groups: Sequence[KvGroup], counts: Sequence[int]) -> None:
        super().__init__(groups, counts)
        self._lengths = {
            group.name: np.zeros(count, np.int64)
            for group, count in zip(groups, counts, strict=True)
        }
        self._views: dict[tuple[str, int, int], dict[str, Any]] = {}

    def takes(self) -> dict[str, Kind]:
        return of_groups(self.groups, _SLOTS)

    def shape(self, group: KvGroup, count: int, size: int) -> tuple[int, ...]:
        return count, group.num_kv_heads, group.block_size, size

    def copy_block(self, group: KvGroup, source: int, destination: int) -> None:
        super().copy_block(group, source, destination)
        lengths = self._lengths[group.name]
        lengths[destination] = lengths[source]

    def feeds(self, step: Step, binding: Any) -> Feeds:
        feeds: Feeds = {}
        for group, table in zip(self.groups, step.block_tables, strict=True):
            slots = table[:, 0].astype(np.int64)
            first, count = int(slots.min()), int(slots.max() - slots.min()) + 1
            lengths = self._lengths[group.name]
            lengths[slots] = step.context_lengths
            held = lengths[first : first + count].copy()
            for name, value in self._range(group, first, count).items():
                bind(binding, name, value)
            rows = slot_rows(step, slots - first, held)
            feeds |= {f"{name}.{group.name}": array for name, array in rows.items()}
        return feeds

    def _range(self, group: KvGroup, first: int, count: int) -> dict[str, Any]:
        """The slots from `first` on, as onnxruntime takes them."""
        key = group.name, first, count
        if key not in self._views:
            if len(self._views) >= _MOST_VIEWS:
                self._views.clear()
            self._views[key] = {
                f"{layer}.{part}": self.bound(
                    group, self.arrays[f"{layer}.{part}"][first : first + count]
                )
                for layer in group.layers
                for part in ("key", "value")
            }
        return self._views[key]

    def clear(self) -> None:
        self._views.clear()
        super().clear()


class GroupedPools(SlotPools):
    """Slots of a model that attends with `GroupQueryAttention`."""

    def takes(self) -> dict[str, Kind]:
        return of_groups(self.groups, _GROUPED)


def of_groups(groups: Sequence[KvGroup], kinds: Mapping[str, Kind]) -> dict[str, Kind]:
    """Inputs that there are once for each group."""
    return {f"{name}.{group.name}": kind for group in groups for name, kind in kinds.items()}


def bind(binding: Any, name: str, value: Any) -> None:
    """Let a layer's keys or values be read from and written to the same memory."""
    binding.bind_ortvalue_input(f"kv.{name}", value)
    binding.bind_ortvalue_output(f"kv_out.{name}", value)


_FORMS: Final[dict[str, type[Pools]]] = {
    "paged": PagedPools,
    "slots": SlotPools,
    "grouped-queries": GroupedPools,
}


def open_pools(form: str, groups: Sequence[KvGroup], counts: Sequence[int], where: str) -> Pools:
    """Memory in the form that a model was made for; ArtifactError for one that is unknown."""
    if form not in _FORMS:
        raise ArtifactError(
            f"the model keeps keys and values in the form {form!r}, which this infc does not know",
            where=where,
            hint="open it with the version of infc that compiled it",
        )
    return _FORMS[form](groups, counts)
