"""The arrays of a step as a model in ONNX takes them: attention's rows padded, keys by slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...ir.resources import KvGroup
from ..scheduling.step import Step

Int64Array = NDArray[np.int64]

UNSEEN: Final = 1 << 30
"""The position of keys that are there to fill a row up: no query sees it."""

_GATHER_COST: Final = 4
"""How many queries cost as much to compute as their keys and values do to gather."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """Tokens of sequences, one after the other, that are one row of attention each."""

    starts: Int64Array  # [P] the first token of each in the step
    counts: Int64Array  # [P]
    sequences: Int64Array  # [P] whose they are

    @classmethod
    def of(cls, step: Step) -> Pieces:
        """Those of a step, as long as it takes least to compute them.

        Rows are padded to the longest, so that a long chunk of one prompt would make as much work
        of each sequence that decodes beside it. Several rows may have the same keys instead, which
        are then gathered more than once.
        """
        counts = np.diff(step.query_starts).astype(np.int64)
        longest = int(counts.max(initial=1))
        sizes = [1 << i for i in range(longest.bit_length())] + [longest]
        size = min(sizes, key=lambda size: int((-(-counts // size)).sum()) * (size + _GATHER_COST))
        each = -(-counts // size)
        sequences = np.repeat(np.arange(len(counts)), each)
        place = np.arange(len(sequences)) - np.repeat(np.cumsum(each) - each, each)
        first = place * size
        starts = step.query_starts[:-1].astype(np.int64)[sequences] + first
        return cls(starts, np.minimum(size, counts[sequences] - first), sequences)


def padded_rows(pieces: Pieces) -> dict[str, Int64Array]:
    """`row_of_padded [B, Q]`, the token in each place, and `padded_of_row [T]`, each token's place.

    A row is filled up with its last token, so that what is computed there is no less finite than
    what is wanted.
    """
    longest = int(pieces.counts.max(initial=1))
    within = np.minimum(np.arange(longest), pieces.counts[:, None] - 1)
    rows = np.repeat(np.arange(len(pieces.counts)), pieces.counts)
    places = np.arange(len(rows)) - pieces.starts[rows]
    return {
        "row_of_padded": pieces.starts[:, None] + within,
        "padded_of_row": rows * longest + places,
    }


def paged_keys(step: Step, groups: Sequence[KvGroup], pieces: Pieces) -> dict[str, Int64Array]:
    """For each group the slots of the step's tokens, and of all keys that a row sees any of.

    Rows of keys are filled up with the last of their sequence.
    """
    feeds: dict[str, Int64Array] = {}
    positions = step.positions.astype(np.int64)
    ends = positions[pieces.starts + pieces.counts - 1] + 1
    for group, table, slots in zip(groups, step.block_tables, step.slots, strict=True):
        first = np.zeros(len(ends), np.int64)
        if group.window is not None:  # blocks before it may have been freed
            first = np.maximum(0, positions[pieces.starts] - group.window + 1)
        places = first[:, None] + np.arange(int((ends - first).max(initial=1)))
        is_key = places < ends[:, None]
        stored = np.where(is_key, places, ends[:, None] - 1)
        blocks = table[pieces.sequences[:, None], stored // group.block_size].astype(np.int64)
        feeds[f"slots.{group.name}"] = slots.astype(np.int64)[:, None]
        feeds[f"key_slots.{group.name}"] = blocks * group.block_size + stored % group.block_size
        feeds[f"key_positions.{group.name}"] = np.where(is_key, places, UNSEEN)
    return feeds


def slot_rows(step: Step, rows: Int64Array, lengths: Int64Array) -> dict[str, NDArray[Any]]:
    """What a step says of slots, of which sequence b has the one in row `rows[b]`.

    `lengths` are the tokens stored in each row after the step. Rows whose sequence is not in the
    step compute the step's first token, and write behind what is stored.
    """
    starts = step.query_starts[:-1].astype(np.int64)
    counts = np.diff(step.query_starts).astype(np.int64)
    longest = int(counts.max(initial=1))
    within = np.minimum(np.arange(longest), np.maximum(counts[:, None], 1) - 1)
    tokens = np.zeros((len(lengths), longest), np.int64)
    tokens[rows] = starts[:, None] + within
    queries = np.zeros(len(lengths), np.int64)
    queries[rows] = counts
    sequences = np.repeat(np.arange(len(counts)), counts)
    places = np.arange(step.num_tokens) - starts[sequences]
    return {
        "row_of_padded": tokens,
        "padded_of_row": rows[sequences] * longest + places,
        "write_at": lengths - queries,
        "lengths": lengths,
        "key_count": np.array([lengths[rows].max(initial=1)]),
        "seqlens_k": np.maximum(lengths, 1) - 1,
        "query_seqlens": queries,
        "total_length": np.array(max(int(lengths.max(initial=1)), longest)),
    }


def program_inputs(step: Step, types: Mapping[str, str]) -> dict[str, NDArray[Any]]:
    """The inputs of the program itself; the head wants at least one row."""
    rows = step.logits_index if len(step.logits_index) or step.inputs else np.zeros(1, np.int32)
    given: dict[str, NDArray[Any]] = {
        **step.inputs,
        "input_ids": step.token_ids,
        "positions": step.positions,
        "logits_index": rows,
    }
    return {name: given[name] for name in types}
