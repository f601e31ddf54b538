"""Adjustments: what a step does to the logits of a draw before its token is taken, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .top_tokens import Logits

Ints = NDArray[np.int32]
Mask = NDArray[np.uint32]
"""Tokens that may come, `[ceil(V / 32)]`: bit `i % 32` of word `i // 32` is that of token i."""

NO_MASK: Final = -1
"""What `Adjusted.mask` is where every token may come."""


class Adjusted(NamedTuple):
    """What is done to the row of one draw; see `Adjustments`."""

    draw: int
    mask: int
    bias_begin: int
    bias_end: int
    counts_begin: int
    counts_end: int
    repetition: float
    frequency: float
    presence: float


_TYPES = (*[np.int32] * 6, *[np.float32] * 3)

ADJUSTED = np.dtype(list(zip(Adjusted._fields, _TYPES, strict=True)))
"""An `Adjusted` in an array, as generated code has it (`infc_adjusted` in `abi.hpp`)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adjustments:
    """Steps 1 to 4 of `SamplingParams` for `A` of a step's draws, in order of their draws.

    Of each, `rows` has the draw, the range of its entries in `bias` and in `counts`, its penalties,
    and the row of `masks` with the tokens that may come (or `NO_MASK`). A bias of minus infinity
    bans a token. The ids of a range are distinct. `counts` says how often a token is in the
    output; a token with an entry is in the prompt or the output, so it is repeated.

    If the last token of a draw's sequence is carried (`Step.carried`), the counts do not contain
    it, and the executor adds it. A mask that follows from this token comes late: its number is
    behind those of `masks`.
    """

    rows: NDArray[np.void]  # [A] ADJUSTED
    bias_ids: Ints
    bias: Logits
    count_ids: Ints
    counts: Ints
    masks: Mask  # [M, ceil(V / 32)]

    @property
    def num_late(self) -> int:
        """Masks that come while the step is computed (`TakesLateMasks`)."""
        return max(0, int(self.rows["mask"].max(initial=NO_MASK)) + 1 - len(self.masks))

    def with_late(self, masks: Mask) -> Adjustments:
        """The adjustments with the late masks `[num_late, ceil(V / 32)]`."""
        assert len(masks) == self.num_late
        return replace(
            self, masks=np.concatenate([self.masks, masks]) if len(self.masks) else masks
        )

    def places(self) -> dict[int, int]:
        """The place in `rows` of each draw that has one."""
        return {draw: place for place, draw in enumerate(self.rows["draw"].tolist())}


class Adjustment(NamedTuple):
    """The adjustments of one row, on their way into `Adjustments`."""

    repetition: float
    frequency: float
    presence: float
    bias_ids: Ints
    bias: Logits
    count_ids: Ints
    counts: Ints
    mask: Mask | None


LATE: Final = np.zeros(0, np.uint32)
"""The mask of an `Adjustment` that is not known when the step is planned."""
NO_IDS: Final = np.zeros(0, np.int32)
NO_BIAS: Final = np.zeros(0, np.float32)


def gather(draws: Sequence[int], entries: Sequence[Adjustment]) -> Adjustments:
    """The adjustments of these draws, ascending. A mask that several share is there once."""
    masks = {id(e.mask): e.mask for e in entries if e.mask is not None and e.mask is not LATE}
    places = {key: place for place, key in enumerate(masks)}
    rows, late = [], len(masks)
    bias = counts = 0
    for draw, entry in zip(draws, entries, strict=True):
        mask = NO_MASK if entry.mask is None else places.get(id(entry.mask), late)
        late += mask == late
        bias_end, counts_end = bias + len(entry.bias), counts + len(entry.counts)
        ranges = (bias, bias_end, counts, counts_end)
        rows.append((draw, mask, *ranges, entry.repetition, entry.frequency, entry.presence))
        bias, counts = bias_end, counts_end
    return Adjustments(
        rows=np.array(rows, ADJUSTED),
        bias_ids=np.concatenate([entry.bias_ids for entry in entries]),
        bias=np.concatenate([entry.bias for entry in entries]),
        count_ids=np.concatenate([entry.count_ids for entry in entries]),
        counts=np.concatenate([entry.counts for entry in entries]),
        masks=np.stack([*masks.values()]) if masks else np.zeros((0, 0), np.uint32),
    )


def adjusted_row(
    logits: Logits, adjustments: Adjustments, place: int, carried: int | None = None
) -> Logits:
    """A changed copy of `logits` [V], which has no NaN: what `adjustments.rows[place]` says.

    `carried` is a token of the output that the counts do not contain.
    """
    row, entry = logits.copy(), Adjusted(*adjustments.rows[place].item())
    with np.errstate(over="ignore"):
        biased = slice(entry.bias_begin, entry.bias_end)
        row[adjustments.bias_ids[biased]] += adjustments.bias[biased]
        counted = slice(entry.counts_begin, entry.counts_end)
        ids, counts = adjustments.count_ids[counted], adjustments.counts[counted]
        if carried is not None:
            ids, counts = _with_one_more(ids, counts, carried)
        scores, penalty = row[ids], entry.repetition
        scores = np.where(scores < 0, scores * penalty, scores / penalty)
        scores -= counts.astype(np.float32) * entry.frequency
        scores -= np.where(counts > 0, np.float32(entry.presence), np.float32(0))
        row[ids] = scores
    if entry.mask != NO_MASK:
        row[~unpacked(adjustments.masks[entry.mask], len(row))] = -np.inf
    return row


def _with_one_more(ids: Ints, counts: Ints, token: int) -> tuple[Ints, Ints]:
    """Distinct tokens and their counts, with one more of `token`."""
    found = ids == token
    if found.any():
        return ids, counts + found
    return np.append(ids, np.int32(token)), np.append(counts, np.int32(1))


def packed(allowed: NDArray[np.bool_]) -> Mask:
    """The mask of the tokens that may come, bool `[V]`."""
    mask = np.zeros(-(-len(allowed) // 32), np.uint32)
    bits = np.packbits(allowed, bitorder="little")
    mask.view(np.uint8)[: len(bits)] = bits
    return mask


def unpacked(mask: Mask, size: int) -> NDArray[np.bool_]:
    """Whether each of `size` tokens may come, bool `[size]`."""
    return np.unpackbits(mask.view(np.uint8), count=size, bitorder="little").view(np.bool_)
