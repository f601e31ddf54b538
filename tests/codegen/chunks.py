"""Steps of chunks of sequences. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infc.runtime.scheduling.step import Step


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence that a step computes: ids and the position of the first."""

    ids: Sequence[int]
    start: int
    blocks: Sequence[int]
    """Ids of the sequence's blocks, the same for every KV group."""


def make_step(
    chunks: Sequence[Chunk], *, num_groups: int, block_size: int, rows: Sequence[int] | None = None
) -> Step:
    """A step over chunks; by default every row's logits are wanted."""
    ids = [token for chunk in chunks for token in chunk.ids]
    positions = [chunk.start + i for chunk in chunks for i in range(len(chunk.ids))]
    starts = np.cumsum([0, *(len(chunk.ids) for chunk in chunks)])
    width = max((len(chunk.blocks) for chunk in chunks), default=1)
    table = [[*chunk.blocks, *[0] * (width - len(chunk.blocks))] for chunk in chunks]
    slots = [
        chunk.blocks[p // block_size] * block_size + p % block_size
        for chunk in chunks
        for p in range(chunk.start, chunk.start + len(chunk.ids))
    ]
    return Step(
        token_ids=_ints(ids),
        positions=_ints(positions),
        query_starts=_ints(starts),
        context_lengths=_ints([chunk.start + len(chunk.ids) for chunk in chunks]),
        block_tables=(_ints(table).reshape(len(chunks), width),) * num_groups,
        slots=(_ints(slots),) * num_groups,
        block_copies=(np.zeros((0, 2), dtype=np.int32),) * num_groups,
        logits_index=_ints(range(len(ids)) if rows is None else rows),
    )


def _ints(values: object) -> NDArray[np.int32]:
    array = np.asarray(list(values) if isinstance(values, range) else values, dtype=np.int32)
    return np.ascontiguousarray(array)
