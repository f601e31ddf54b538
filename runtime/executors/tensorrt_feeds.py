"""Steps in the parts that an engine computes: decoding sequences together, then chunks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from ...ir.errors import CapacityError
from ...ir.resources import KvGroup
from ...ir.tensorrt_engine import StepProfile
from ..scheduling.step import Step

Int64Array = NDArray[np.int64]

_MOST_PADDING: Final = 4
"""Places of padded rows for each token of a part with chunks, at most."""
_LEAST_KEYS: Final = 32
"""The fewest keys that a part reads, so that short contexts share a graph."""


@dataclass(frozen=True, slots=True)
class Part:
    """Sequences of a step that are computed at once, by a profile.

    In a `decode` part, each has one token.
    """

    profile: int
    decode: bool
    sequences: Int64Array  # [B'] places in the step
    slots: tuple[Int64Array, ...]  # [B'] in each group
    firsts: tuple[int, ...]  # the first slot that is bound, of each group
    rows: tuple[int, ...]  # slots that are bound, of each group
    keys: int  # keys that are read of each slot


@dataclass(frozen=True, slots=True)
class Feeds:
    """The arrays of a part, and the rows of logits in the step that it gives."""

    arrays: Mapping[str, Int64Array]
    logit_rows: Int64Array


class StepParts:
    """Cuts steps into parts that the profiles of an engine take.

    Rows of attention are padded to the longest chunk, so that sequences that decode would compute
    as many rows as a prompt beside them: they are a part of their own, and chunks of very different
    lengths, or in slots far from each other, as well.
    """

    def __init__(
        self,
        profiles: Sequence[StepProfile],
        num_slots: Sequence[int],
        longest: int,
    ) -> None:
        self._profiles = tuple(profiles)
        self._num_slots, self._longest = tuple(num_slots), longest
        self._decode = [place for place, one in enumerate(profiles) if one.decode]
        self._chunks = [place for place, one in enumerate(profiles) if not one.decode]

    def of(self, step: Step) -> Iterator[Part]:
        """The parts of a step, chunks first; CapacityError for one beyond all profiles."""
        counts = np.diff(step.query_starts).astype(np.int64)
        slots = tuple(table[:, 0].astype(np.int64) for table in step.block_tables)
        order = np.lexsort((slots[0] if slots else np.arange(len(counts)),))
        chunks, ones = order[counts[order] > 1], order[counts[order] == 1]
        for decode, sequences in ((False, chunks), (True, ones)):
            for taken in self._cut(counts, slots, sequences, decode=decode):
                yield self._part(step, counts, slots, taken, decode=decode)

    def _cut(
        self,
        counts: Int64Array,
        slots: Sequence[Int64Array],
        sequences: Int64Array,
        *,
        decode: bool,
    ) -> Iterator[Int64Array]:
        """Runs of sequences, in the order of their slots, none of which is padded too much."""
        begin = 0
        for end in range(1, len(sequences) + 1):
            if end == len(sequences) or not self._fits(
                counts, slots, sequences[begin : end + 1], decode=decode
            ):
                yield sequences[begin:end]
                begin = end

    def _fits(
        self, counts: Int64Array, slots: Sequence[Int64Array], taken: Int64Array, *, decode: bool
    ) -> bool:
        span = max((_span(one[taken])[1] for one in slots), default=1)
        most = max(self._profiles[i].rows for i in (self._decode if decode else self._chunks))
        tokens = int(counts[taken].sum())
        return span <= most and (decode or span * counts[taken].max() <= _MOST_PADDING * tokens)

    def _part(
        self,
        step: Step,
        counts: Int64Array,
        slots: Sequence[Int64Array],
        taken: Int64Array,
        *,
        decode: bool,
    ) -> Part:
        spans = [_span(one[taken]) for one in slots]
        rows = max((count for _, count in spans), default=1)
        profile = self._profile(rows, counts[taken], decode=decode)
        bound = self._profiles[profile].rows if decode else 0
        firsts, counted = [], []
        for (first, count), num in zip(spans, self._num_slots, strict=True):
            wanted = bound or count
            # Slot 0 is that of padding.
            if bound and first >= 1 and first + count <= 1 + wanted:
                first = 1  # the same for as many steps as possible, which share a graph
            firsts.append(min(first, num - wanted))
            counted.append(wanted)
        longest = int(step.context_lengths[taken].max(initial=1))
        keys = min(self._longest, max(_LEAST_KEYS, 1 << (longest - 1).bit_length()))
        own = tuple(one[taken] for one in slots)
        return Part(profile, decode, taken, own, tuple(firsts), tuple(counted), keys)

    def _profile(self, rows: int, counts: Int64Array, *, decode: bool) -> int:
        """The smallest profile that takes so many rows with these tokens."""
        tokens, queries = int(counts.sum()), int(counts.max(initial=1))
        for place in self._decode if decode else self._chunks:
            one = self._profiles[place]
            if rows <= one.rows and tokens <= one.tokens and queries <= one.queries:
                return place
        raise CapacityError(
            f"no profile of the engine takes {tokens} tokens in {rows} rows of at most {queries}"
        )


def _span(slots: Int64Array) -> tuple[int, int]:
    """The first of these slots, and how many there are up to the last."""
    first = int(slots.min())
    return first, int(slots.max()) - first + 1


def part_feeds(
    step: Step,
    part: Part,
    profile: StepProfile,
    groups: Sequence[KvGroup],
    lengths: Sequence[Int64Array],
) -> Feeds:
    """The inputs of an engine for a part of a step.

    `lengths` are the tokens that each slot of a group holds before it. Rows whose sequence is not
    in the part compute one of its tokens, and write behind what is stored. Decode parts are padded
    to the sizes of their profile.
    """
    starts = step.query_starts.astype(np.int64)
    counts = np.diff(starts)[part.sequences]
    tokens = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in part.sequences])
    size = profile.tokens if part.decode else len(tokens)
    begins = np.cumsum(counts) - counts
    wanted = np.flatnonzero(np.isin(step.logits_index, tokens))
    place_of = {int(token): place for place, token in enumerate(tokens)}
    heads = [place_of[int(token)] for token in step.logits_index[wanted]]
    logits = profile.logit_rows if part.decode else max(1, len(heads))
    arrays: dict[str, Int64Array] = {
        "input_ids": _padded(step.token_ids[tokens], size),
        "positions": _padded(step.positions[tokens], size),
        "logits_index": _padded(np.array(heads, np.int64), logits),
    }
    queries = 1 if part.decode else int(counts.max(initial=1))
    of_tokens = np.repeat(np.arange(len(counts)), counts)
    within = np.arange(len(tokens)) - begins[of_tokens]
    for place, group in enumerate(groups):
        first, rows = part.firsts[place], part.rows[place]
        own = part.slots[place] - first
        index = np.zeros((rows, queries), np.int64)
        index[own] = begins[:, None] + np.minimum(np.arange(queries), counts[:, None] - 1)
        write_at = lengths[place][first : first + rows].copy()
        write_at[own] = step.context_lengths[part.sequences] - counts
        arrays |= {
            f"row_of_padded.{group.name}": index,
            f"padded_of_row.{group.name}": _padded(own[of_tokens] * queries + within, size),
            f"write_at.{group.name}": write_at,
            f"key_places.{group.name}": np.arange(part.keys),
        }
    return Feeds(arrays, wanted)


def _padded(values: NDArray[Any], size: int) -> Int64Array:
    """Values behind which there is 0."""
    found = np.zeros(size, np.int64)
    found[: len(values)] = values
    return found
