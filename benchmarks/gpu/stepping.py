"""Steps that are timed, and their times. Nothing here needs torch, as serving does not."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from infc.ir.resources import Resource
from infc.runtime.executors.gpu.executor import GpuExecutor
from infc.runtime.sampling.draws import GREEDY, draws_of
from infc.runtime.scheduling.step import Step
from tests.codegen.chunks import Chunk, make_step

from .setting import STEPS

WARM: Final = 3
"""Decode steps that only warm up."""

Groups = Sequence[Resource]


def most_blocks(block_size: int, decodes: Sequence[tuple[int, int]], prompts: Sequence[int]) -> int:
    """Blocks that the largest of these steps needs, and the null block."""
    blocks = [batch * _blocks(context, block_size) for batch, context in decodes]
    return 1 + max([*blocks, *(_blocks(tokens, block_size) for tokens in prompts)])


def _blocks(context: int, block_size: int) -> int:
    return -(-(context + STEPS + WARM) // block_size)


def decode(
    executor: GpuExecutor, groups: Groups, batch: int, context: int, num_steps: int = STEPS
) -> dict[str, float]:
    """Steps of one token a sequence, each of which reads the tokens of the one before."""
    steps = [decode_step(groups, batch, context, place) for place in range(num_steps + WARM)]
    hosts, begun, running = [], 0.0, None
    for place, step in enumerate(steps):
        if place == WARM:
            begun = time.perf_counter()
        at = time.perf_counter()
        after = executor.launch(step)
        hosts.append(time.perf_counter() - at)
        if running is not None:
            running.result()
        running = after
    assert running is not None
    running.result()
    seconds = (time.perf_counter() - begun) / num_steps
    host = statistics.median(hosts[WARM:])
    return {
        "ms": round(seconds * 1e3, 4),
        "tokens/s": round(batch / seconds, 1),
        "launching, µs": round(host * 1e6, 1),
    }


def decode_step(groups: Groups, batch: int, context: int, place: int) -> Step:
    """The `place`-th step that decodes a token of each sequence; the first knows its tokens."""
    (block_size,) = {group.block_size for group in groups}
    blocks = _blocks(context, block_size)
    chunks = [
        Chunk([0 if place else 7], context - 1 + place, range(1 + b * blocks, 1 + (b + 1) * blocks))
        for b in range(batch)
    ]
    rows = list(range(batch))
    step = make_step(chunks, num_groups=len(groups), block_size=block_size, rows=rows)
    draws = [GREEDY._replace(row=row, position=context + place) for row in rows]
    carried = np.repeat(np.arange(batch if place else 0, dtype=np.int32), 2).reshape(-1, 2)
    none = np.zeros(0, np.int32)
    return replace(step, draws=draws_of(draws), carried=carried, logits_rows=none)


def prompt(
    executor: GpuExecutor, groups: Groups, tokens: int, repeats: int = 5
) -> dict[str, float]:
    """A step with a whole prompt, each after the one before has ended."""
    (block_size,) = {group.block_size for group in groups}
    chunk = Chunk(
        [7 + place % 400 for place in range(tokens)], 0, range(1, 1 + -(-tokens // block_size))
    )
    step = make_step([chunk], num_groups=len(groups), block_size=block_size, rows=[tokens - 1])
    step = replace(step, draws=draws_of([GREEDY]), logits_rows=np.zeros(0, np.int32))
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        executor.launch(step).result()
        times.append(time.perf_counter() - begun)
    seconds = statistics.median(times[1:] or times)
    return {"ms": round(seconds * 1e3, 3), "tokens/s": round(tokens / seconds, 1)}
