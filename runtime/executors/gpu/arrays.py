"""The arrays of a step: where each lies in the one buffer that is uploaded, and what pads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from ....ir.manifest import CompiledProgram
from ....ir.types import TensorType
from ...sampling.adjustments import ADJUSTED
from ...sampling.draws import DRAW

_ALIGNMENT: Final = 16

GROWING: Final = ("bias_ids", "bias", "count_ids", "counts", "masks")
"""Arrays without a bound of their own: each has memory that grows. `block_copies:GROUP` too."""

GENERATION: Final = "@growing"
"""Stands beside the sizes of a step, and changes when an array that grows has moved."""


@dataclass(frozen=True, slots=True)
class PackedArray:
    """An array of the step with `item_bytes` for each of `size`, and for `extra` more."""

    name: str
    size: str
    item_bytes: int
    extra: int = 0
    kind: TensorType | None = None
    """Of an input of the program's own, whose bytes follow from its type."""

    def num_bytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes where the sizes are these."""
        if self.kind is not None:
            return self.kind.num_bytes(sizes)
        return (sizes[self.size] + self.extra) * self.item_bytes


def packed_arrays(program: CompiledProgram) -> tuple[PackedArray, ...]:
    """The arrays that are uploaded as one, in their order.

    What pieces of a captured step read comes first: their addresses depend on the sizes of all
    before them.
    """
    slots = [PackedArray(f"slots:{group.name}", "T", 4) for group in program.resources]
    further = [
        PackedArray(f"input:{name}", "", 0, kind=kind)
        for name, kind in program.further_inputs.items()
    ]
    return (
        PackedArray("token_ids", "T", 4),
        PackedArray("positions", "T", 4),
        *slots,
        PackedArray("carried", "P", 8),
        PackedArray("query_starts", "B", 4, 1),
        PackedArray("context_lengths", "B", 4),
        PackedArray("logits_index", "R", 4),
        PackedArray("logits_rows", "L", 4),
        PackedArray("draws", "D", DRAW.itemsize),
        PackedArray("adjusted", "A", ADJUSTED.itemsize),
        PackedArray("tile_sequences", "tiles", 4),
        PackedArray("tile_rows", "tiles", 4),
        *further,
    )


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the arrays of a step of some sizes lie: offsets, and bytes in all."""

    offsets: Mapping[str, int]
    num_bytes: int


@dataclass(slots=True)
class Layouts:
    """The layouts of a program's steps; those of the last few sizes are kept."""

    arrays: tuple[PackedArray, ...]
    symbols: tuple[str, ...]
    _kept: dict[tuple[int, ...], Layout] = field(default_factory=dict)

    MOST: Final = 256

    def of(self, sizes: Mapping[str, int]) -> Layout:
        """The layout for these sizes."""
        key = tuple([sizes[name] for name in self.symbols])
        found = self._kept.get(key)
        if found is None:
            if len(self._kept) >= self.MOST:
                self._kept.clear()
            found = self._kept[key] = self._make(sizes)
        return found

    def _make(self, sizes: Mapping[str, int]) -> Layout:
        offsets, at = {}, 0
        for array in self.arrays:
            offsets[array.name] = at
            at += -(-array.num_bytes(sizes) // _ALIGNMENT) * _ALIGNMENT
        return Layout(offsets, at)

    def sizes_before(self, name: str) -> set[str]:
        """The sizes that the place of an array depends on."""
        found: set[str] = set()
        for array in self.arrays:
            if array.name == name:
                return found
            if array.kind is None:
                found.add(array.size)
            else:
                found |= set(self.symbols)
        raise LookupError(name)


def layouts(program: CompiledProgram) -> Layouts:
    """The layouts of a program's steps."""
    known = ("T", "P", "B", "R", "L", "D", "A", "tiles")
    return Layouts(packed_arrays(program), (*known, *sorted(program.limits.sizes)))


def greatest_sizes(program: CompiledProgram) -> dict[str, int]:
    """The most of each size in a step that keeps to the limits."""
    limits = program.limits
    tokens, sequences, rows = limits.step_tokens, limits.max_sequences, limits.logit_rows
    draws = min(sequences, rows)  # a step samples no more sequences than it has rows
    sizes = {"T": tokens, "B": sequences, "R": rows, "L": rows, "D": draws, "A": draws}
    return {**limits.sizes, **sizes, "P": sequences, "C": sequences, "tiles": tokens + sequences}


def padded(size: int, ladder: Sequence[int], most: int) -> int:
    """The least step of a ladder that is at least `size`, but not above `most`; 0 stays."""
    if size == 0:
        return 0
    for step in ladder:
        if step >= size:
            return max(size, min(step, most))
    return size
