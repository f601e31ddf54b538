"""Steps made by hand, to run on an executor alone: so many sequences with so much behind them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...ir.manifest import Manifest
from ...runtime.kv_groups import blocks_for
from ...runtime.step import Step
from .roofline import StepShape

Int32Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TrialStep:
    """`batch` sequences, each computing `queries` tokens, with `context` stored when it has run.

    What is stored before is whatever the memory held: it costs the same to read.
    """

    batch: int
    queries: int
    context: int

    @property
    def shape(self) -> StepShape:
        """Its shape: every sequence wants its last row of logits."""
        return StepShape.of([(self.queries, self.context)] * self.batch)

    def num_blocks(self, manifest: Manifest) -> tuple[int, ...]:
        """Blocks that each KV group must have, the null block included."""
        return tuple(
            1 + self.batch * blocks_for(self.context, group.block_size)
            for group in manifest.kv.groups
        )

    def build(self, manifest: Manifest) -> Step:
        """The step, with random tokens; sequence b has the b-th run of blocks in every group."""
        draw = random.Random(self.context)
        count = self.batch * self.queries
        own = np.arange(self.context - self.queries, self.context)
        tables = [self._table(group.block_size) for group in manifest.kv.groups]
        sizes = [group.block_size for group in manifest.kv.groups]
        return Step(
            token_ids=_ints([draw.randrange(manifest.model.vocab_size) for _ in range(count)]),
            positions=_ints(np.tile(own, self.batch)),
            query_starts=_ints(np.arange(self.batch + 1) * self.queries),
            context_lengths=_ints([self.context] * self.batch),
            block_tables=tuple(tables),
            slots=tuple(
                _ints(table[:, own // size] * size + own % size).reshape(-1)
                for table, size in zip(tables, sizes, strict=True)
            ),
            block_copies=tuple(np.zeros((0, 2), np.int32) for _ in tables),
            logits_index=_ints(np.arange(1, self.batch + 1) * self.queries - 1),
        )

    def _table(self, block_size: int) -> Int32Array:
        each = blocks_for(self.context, block_size)
        return _ints(1 + np.arange(self.batch * each)).reshape(self.batch, each)


def _ints(values: Sequence[int] | NDArray[np.signedinteger]) -> Int32Array:
    return np.ascontiguousarray(values, dtype=np.int32)
