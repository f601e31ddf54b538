"""Steps made by hand, to run on an executor alone: so many sequences with so much behind them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...ir.manifest import Manifest
from ...ir.roofline import StepShape
from ...runtime.executors.base import run_step
from ...runtime.sampling.draws import DRAW, GREEDY
from ...runtime.scheduling.kv_groups import blocks_for
from ...runtime.scheduling.step import Step

if TYPE_CHECKING:
    from ...runtime.executors.base import Executor

Int32Array = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class TrialStep:
    """`batch` sequences, each computing `queries` tokens, with `context` stored when it has run.

    What they find stored is whatever the blocks hold: see `fill_blocks`.
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
            for group in manifest.main.resources
        )

    def build(self, manifest: Manifest) -> Step:
        """The step, with random tokens; sequence b has the b-th run of blocks in every group.

        Each takes its greatest logit, and nobody wants the logits themselves.
        """
        draw = random.Random(self.context)
        count = self.batch * self.queries
        own = np.arange(self.context - self.queries, self.context)
        tables = [self._table(group.block_size) for group in manifest.main.resources]
        sizes = [group.block_size for group in manifest.main.resources]
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
            logits_rows=_ints([]),
            draws=np.array([GREEDY._replace(row=row) for row in range(self.batch)], DRAW),
        )

    def _table(self, block_size: int) -> Int32Array:
        each = blocks_for(self.context, block_size)
        return _ints(1 + np.arange(self.batch * each)).reshape(self.batch, each)


def fill_blocks(executor: Executor, manifest: Manifest, num_blocks: Sequence[int]) -> None:
    """Puts the first tokens of a prompt into every block but the null block.

    Memory that nobody wrote to is one page of zeros wherever it is read, and always in a cache.
    """
    sizes = [group.block_size for group in manifest.main.resources]
    count = min([*sizes, manifest.main.limits.step_tokens, manifest.main.limits.max_context])
    step = TrialStep(1, count, count).build(manifest)
    run_step(executor, step)
    copies = (np.stack([np.ones(n - 2), np.arange(2, n)], axis=1) for n in num_blocks)
    run_step(executor, replace(step, block_copies=tuple(_ints(pairs) for pairs in copies)))


def _ints(values: Sequence[int] | NDArray[Any]) -> Int32Array:
    return np.ascontiguousarray(values, dtype=np.int32)
