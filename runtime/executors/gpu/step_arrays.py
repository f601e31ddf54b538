"""A step's arrays as the device gets them: padded, with tiles of queries, in pinned memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...sampling.adjustments import ADJUSTED, NO_MASK, Adjusted, Adjustments
from ...sampling.draws import DRAW, GREEDY
from ...scheduling.step import Int32Array, Step
from .arrays import Layout
from .driver import Bytes
from .staging import raw

Sizes = Mapping[str, int]

_UNADJUSTED: Final = np.array(Adjusted(0, NO_MASK, 0, 0, 0, 0, 1.0, 0.0, 0.0), ADJUSTED)
_GREEDY: Final = np.array(GREEDY, DRAW)


class StepWriter:
    """Writes the arrays of one step, for these sizes, into memory of this layout."""

    def __init__(self, memory: Bytes, layout: Layout, sizes: Sizes) -> None:
        self._memory, self._offsets, self._sizes = memory, layout.offsets, sizes

    def write(self, step: Step, groups: tuple[str, ...], tiles: tuple[Int32Array, ...]) -> None:
        """All that is uploaded as one. What pads a step computes rows that nobody reads."""
        tokens, sequences = self._sizes["T"], self._sizes["B"]
        self._put("token_ids", step.token_ids, tokens, 0)
        self._put("positions", step.positions, tokens, 0)
        for name, slots in zip(groups, step.slots, strict=True):
            self._put(f"slots:{name}", slots, tokens, -1)
        self._put_starts(step.query_starts, sequences)
        self._put("context_lengths", step.context_lengths, sequences, 0)
        if self._sizes["P"]:
            self._put_carried(step.carried, self._sizes["P"])
        if rows := self._sizes["R"]:
            self._put("logits_index", step.logits_index, rows, 0)
        if rows := self._sizes["L"]:
            wanted = step.logits_rows
            if wanted is None:
                wanted = np.arange(len(step.logits_index), dtype=np.int32)
            self._put("logits_rows", wanted, rows, 0)
        if count := self._sizes["D"]:
            draws = self._records("draws", count, DRAW)
            draws[: len(step.draws)] = step.draws
            draws[len(step.draws) :] = _GREEDY
        if count := self._sizes["A"]:
            self._put_adjusted(step.adjustments, count)
        for name, values in zip(("tile_sequences", "tile_rows"), tiles, strict=False):
            self._put(name, values, len(values), 0)
        for name, array in step.inputs.items():
            at = self._offsets[f"input:{name}"]
            self._memory[at : at + array.nbytes] = raw(array)

    def _records(self, name: str, count: int, kind: np.dtype[Any]) -> NDArray[Any]:
        at = self._offsets[name]
        return self._memory[at : at + count * kind.itemsize].view(kind)

    def _put(self, name: str, values: Int32Array, count: int, padding: int) -> None:
        at, given = self._offsets[name], len(values)
        target = self._memory[at : at + 4 * count].view(np.int32)
        target[:given] = values
        if given < count:
            target[given:] = padding

    def _put_starts(self, starts: Int32Array, sequences: int) -> None:
        at, given = self._offsets["query_starts"], len(starts)
        target = self._memory[at : at + 4 * (sequences + 1)].view(np.int32)
        target[:given] = starts
        target[given:] = starts[-1] if given else 0

    def _put_carried(self, carried: Int32Array, count: int) -> None:
        at = self._offsets["carried"]
        target = self._memory[at : at + 8 * count].view(np.int32).reshape(count, 2)
        target[: len(carried)] = carried
        target[len(carried) :] = (-1, 0)

    def _put_adjusted(self, adjustments: Adjustments | None, count: int) -> None:
        """The records as they are, or one for every draw, of which some change nothing."""
        assert adjustments is not None
        records, rows = self._records("adjusted", count, ADJUSTED), adjustments.rows
        if len(rows) == count:
            records[:] = rows
            return
        records[:] = _UNADJUSTED
        records["draw"] = np.arange(count, dtype=np.int32)
        records[rows["draw"]] = rows


def query_tiles(query_starts: Int32Array, tile: int) -> tuple[Int32Array, Int32Array]:
    """The sequence of each tile of at most `tile` queries, and its first row in the sequence."""
    counts = -(-np.diff(query_starts) // tile)
    sequences = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    firsts = np.cumsum(counts) - counts
    rows = (np.arange(len(sequences)) - np.repeat(firsts, counts)) * tile
    return sequences, rows.astype(np.int32)


def growing_arrays(step: Step, groups: tuple[str, ...], copies: int) -> dict[str, Bytes]:
    """The bytes of the arrays that have no bound, as far as the step has any of them.

    Where groups copy different numbers of blocks, pairs of null blocks fill them up to `copies`.
    """
    found: dict[str, Bytes] = {}
    for name, pairs in zip(groups, step.block_copies if copies else (), strict=False):
        filled = np.zeros((copies, 2), np.int32)
        filled[: len(pairs)] = pairs
        found[f"block_copies:{name}"] = raw(filled)
    a = step.adjustments
    if a is not None:
        arrays = {"bias_ids": a.bias_ids, "bias": a.bias, "count_ids": a.count_ids}
        for name, array in {**arrays, "counts": a.counts, "masks": a.masks}.items():
            if array.size:
                found[name] = raw(array)
    return found
