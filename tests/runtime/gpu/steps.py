"""Steps made by hand, of sequences that grow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from infc.runtime.sampling.adjustments import Adjustment, Adjustments, gather, packed
from infc.runtime.sampling.draws import Draw, draws_of
from infc.runtime.scheduling.step import Int32Array, Step

from .launched_model import BLOCK, CONTEXT, GROUPS, SEQUENCES, VOCAB

_WIDTH = CONTEXT // BLOCK


class Steps:
    """The steps of some sequences, each with blocks of its own; they begin anew when full."""

    def __init__(self) -> None:
        self.lengths = [0] * SEQUENCES
        self.random = np.random.default_rng(3)

    def decode(self, count: int) -> Step:
        """One more token for each of the first sequences, and a draw from each."""
        return self.of([1] * count, draws=count)

    def of(
        self,
        counts: Sequence[int],
        *,
        logits: str | None = None,
        hidden: bool = False,
        draws: int = 0,
        adjusted: bool = False,
        num_biased: int = 2,
    ) -> Step:
        """So many more tokens for each of the first sequences."""
        begins = []
        for b, count in enumerate(counts):
            # Each has four blocks.
            if self.lengths[b] + count > 4 * BLOCK:
                self.lengths[b] = 0
            begins.append(self.lengths[b])
            self.lengths[b] += count
        positions = [p for b, n in zip(begins, counts, strict=True) for p in range(b, b + n)]
        owners = [b for b, count in enumerate(counts) for _ in range(count)]
        table = np.zeros((len(counts), 4), np.int32)
        for b in range(len(counts)):
            table[b] = 1 + 4 * b + np.arange(4)
        slots = [
            int(table[b, p // BLOCK]) * BLOCK + p % BLOCK
            for b, p in zip(owners, positions, strict=True)
        ]
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        rows = np.sort(self.random.choice(len(counts), min(len(counts), 5), replace=False))
        index = (starts[1:][rows] - 1).astype(np.int32)
        drawn = [
            Draw(int(self.random.integers(99)), 0.9, 0.9, 0.0, 0, d % len(index), d, 7)
            for d in range(draws)
        ]
        return Step(
            token_ids=self.random.integers(0, VOCAB, len(positions)).astype(np.int32),
            positions=np.array(positions, np.int32),
            query_starts=starts,
            context_lengths=np.array(
                [begin + count for begin, count in zip(begins, counts, strict=True)], np.int32
            ),
            block_tables=(table,) * len(GROUPS),
            slots=(np.array(slots, np.int32),) * len(GROUPS),
            block_copies=(np.zeros((0, 2), np.int32),) * len(GROUPS),
            logits_index=index,
            logits_rows=_rows(logits, len(index)),
            draws=draws_of(drawn),
            adjustments=self._adjustments(draws, num_biased) if adjusted and draws else None,
            wants_hidden=hidden,
        )

    def _adjustments(self, draws: int, num_biased: int) -> Adjustments:
        """Of every second draw."""
        chosen = list(range(0, draws, 2))
        allowed = self.random.random(VOCAB) < 0.5
        allowed[0] = True
        entries = [
            Adjustment(
                *(1.3, 0.2, 0.1),
                bias_ids=np.arange(d, d + num_biased, dtype=np.int32),
                bias=np.resize(np.array([1.5, -np.inf], np.float32), num_biased),
                count_ids=np.array([2, 3, d + 12], np.int32),
                counts=np.array([1, 0, 2], np.int32),
                mask=packed(allowed) if d % 4 == 0 else None,
            )
            for d in chosen
        ]
        return gather(chosen, entries)


def _rows(logits: str | None, rows: int) -> Int32Array | None:
    if logits == "all":
        return None
    return np.arange(0 if logits is None else rows // 2, dtype=np.int32)


def chunk(tokens: int) -> Step:
    """The first tokens of one prompt, and a draw."""
    return Steps().of([tokens], draws=1)
