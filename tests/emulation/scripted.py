"""Steps written by hand, which between them take every form, and what they must return."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import numpy as np

from infc.ir.artifact import Artifact
from infc.runtime.executors import open_executor
from infc.runtime.executors.base import ExecutorConfig, run_step
from infc.runtime.sampling.draws import Draw, draws_of
from infc.runtime.sampling.sampler import drawn_token
from infc.runtime.scheduling.step import Step, StepOutput

from ..codegen.harness import Chunk, make_step
from ..e2e.support import BLOCK_SIZE, relative_error

Parts = Sequence[Sequence[tuple[int, int]]]

FORKED: Final = 3
"""A sequence that begins as a copy of sequence 1."""
CROWD: Final = tuple((place, 1) for place in range(4, 22))
SCRIPT: Final = (
    ((0, 70), (1, 21)),
    ((0, 1), (1, 9), (2, 3)),
    ((2, 1), (1, 1), (FORKED, 1), (0, 1)),
    ((2, 1), (1, 1), (0, 1)),
    ((2, 1), (FORKED, 1), (1, 1)),
    CROWD,
)
"""How many tokens each step has of which sequences: prompts beyond the smaller form, a mixed step,
a captured step that copies a block, one that is padded, one that replays it and whose sequences
are others, and one of many sequences."""

_BLOCKS_EACH: Final = 5
NUM_BLOCKS: Final = 1 + 4 * _BLOCKS_EACH + len(CROWD)
SHAPES: Final = ((0.0, 1.0, 0.0, 0), (0.8, 0.9, 0.0, 0), (1.1, 1.0, 0.02, 9))
"""Temperature, top_p, min_p and top_k of draws."""


@dataclass(slots=True)
class _Sequence:
    tokens: list[int]
    blocks: list[int]
    done: int = 0

    def chunk(self, count: int) -> Chunk:
        """The next tokens; the table has no block that is not needed yet."""
        begin, self.done = self.done, self.done + count
        needed = -(-self.done // BLOCK_SIZE)
        return Chunk(self.tokens[begin : self.done], begin, self.blocks[:needed])


@dataclass(slots=True)
class Script:
    """The sequences of the script, for a model with so many tokens and groups of pages."""

    vocab: int
    groups: int
    seed: int
    sequences: list[_Sequence] = field(init=False)

    def __post_init__(self) -> None:
        ids = np.random.default_rng(self.seed).permutation(np.arange(1, NUM_BLOCKS)).tolist()
        random = np.random.default_rng(5)
        self.sequences = []
        for place in range(4 + len(CROWD)):
            count = _BLOCKS_EACH if place < 4 else 1
            own, ids = ids[:count], ids[count:]
            tokens = [int(one) for one in random.integers(1, self.vocab - 64, 80)]
            self.sequences.append(_Sequence(tokens, own))

    def steps(self, script: Parts) -> Iterator[Step]:
        """The steps one after the other; each draws a token of each sequence."""
        for parts in script:
            copies = self._fork() if (FORKED, 1) in parts else []
            chunks = [self.sequences[place].chunk(count) for place, count in parts]
            step = make_step(chunks, num_groups=self.groups, block_size=BLOCK_SIZE)
            draws = [
                Draw(100 + place, *SHAPES[place % 3], int(row) - 1, 0, chunk.start)
                for (place, _), chunk, row in zip(parts, chunks, step.query_starts[1:], strict=True)
            ]
            pairs = np.array(copies, np.int32).reshape(-1, 2)
            yield replace(
                step,
                draws=draws_of(draws),
                wants_hidden=True,
                block_copies=(pairs,) * self.groups,
            )

    def _fork(self) -> list[tuple[int, int]]:
        """Let the forked sequence begin, which shares whole blocks and copies the last one."""
        source, target = self.sequences[1], self.sequences[FORKED]
        if target.done > 0:
            return []
        whole = source.done // BLOCK_SIZE
        target.tokens[: source.done] = source.tokens[: source.done]
        target.blocks[:whole] = source.blocks[:whole]
        target.done = source.done
        return [(source.blocks[whole], target.blocks[whole])]


def run_script(artifact: Artifact, script: Parts = SCRIPT, *, seed: int = 5) -> list[StepOutput]:
    """What each step of a script returns; draws must follow from the logits.

    `seed` chooses the blocks.
    """
    return list(script_outputs(artifact, script, seed))


def script_outputs(
    artifact: Artifact, script: Parts = SCRIPT, seed: int = 5
) -> Iterator[StepOutput]:
    """The same, step by step."""
    groups = artifact.manifest.main.resources
    config = ExecutorConfig(num_blocks=(NUM_BLOCKS,) * len(groups), num_threads=1)
    sequences = Script(artifact.manifest.model.vocab_size, len(groups), seed)
    executor = open_executor(artifact, config)
    try:
        for step in sequences.steps(script):
            found = run_step(executor, step)
            drawn = [drawn_token(found.logits[one["row"]], Draw(*one.item())) for one in step.draws]
            assert found.tokens.tolist() == drawn, "tokens that do not follow from the logits"
            yield found
    finally:
        executor.close()


def errors(found: Sequence[StepOutput], expected: Sequence[StepOutput]) -> list[float]:
    """The largest error of each step's logits and hidden states, relative to its row's largest."""
    assert len(found) == len(expected)
    worst = []
    for one, other in zip(found, expected, strict=True):
        assert one.hidden is not None
        assert other.hidden is not None
        pairs = ((one.logits, other.logits), (one.hidden, other.hidden))
        worst.append(max(relative_error(a, b) for a, b in pairs))
    return worst
