"""From who computes how many tokens to the arrays of a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .kv_cache import KvCache
from .request import Request
from .step import PromptRows, Step

Plan = Sequence[tuple[Request, int]]


class _Rows:
    """Which tokens of the step give a row of logits, and who waits for it."""

    def __init__(self) -> None:
        self.index: list[int] = []
        self.sampled: list[Request] = []
        self.sampled_rows: list[int] = []
        self.prompts: list[PromptRows] = []

    def add_prompt(self, request: Request, first_token: int, start: int, count: int) -> None:
        """The rows of a chunk that a prompt still lacks; `start` is the chunk's position."""
        first = max(start, request.num_prompt_rows)
        wanted = min(start + count, request.num_prompt_tokens - 1) - first
        if wanted > 0:
            self.prompts.append(PromptRows(request, len(self.index), first, wanted))
            begin = first_token + first - start
            self.index.extend(range(begin, begin + wanted))

    def add_sample(self, request: Request, token: int) -> None:
        """The row that the request's next token comes from, and that of all its choices."""
        row = len(self.index)
        self.index.append(token)
        self.sampled.append(request)
        self.sampled_rows.append(row)
        if request.unforked:
            self.sampled += request.unforked
            self.sampled_rows += [row] * len(request.unforked)


def build_step(plan: Plan, kv: KvCache) -> Step:
    """The arrays of the step in which each request computes that many of its tokens."""
    size = kv.block_size
    token_ids: list[int] = []
    rows = _Rows()
    starts, counts = [], []
    for request, count in plan:
        start = request.num_computed
        if request.wants_prompt_rows:
            rows.add_prompt(request, len(token_ids), start, count)
        token_ids += request.token_ids[start : start + count]
        starts.append(start)
        counts.append(count)
        if start + count == len(request.token_ids):
            rows.add_sample(request, len(token_ids) - 1)
    counts_array = np.array(counts, np.int32)
    query_starts = np.zeros(len(plan) + 1, np.int32)
    np.cumsum(counts_array, out=query_starts[1:])
    positions = starts_array = np.array(starts, np.int32)
    sequence = np.arange(len(plan), dtype=np.int32)
    if len(token_ids) > len(plan):  # else each has one token, and that is its position
        sequence = np.repeat(sequence, counts_array)
        tokens = np.arange(len(token_ids), dtype=np.int32)
        positions = tokens + (starts_array - query_starts[:-1])[sequence]
    context_lengths = starts_array + counts_array
    tables = kv.tables([request.blocks for request, _ in plan], int(context_lengths.max()))
    index, offset = np.divmod(positions, np.int32(size))
    return Step(
        token_ids=np.array(token_ids, np.int32),
        positions=positions,
        query_starts=query_starts,
        context_lengths=context_lengths,
        block_tables=tables,
        slots=tuple(table[sequence, index] * size + offset for table in tables),
        block_copies=kv.take_copies(),
        logits_index=np.array(rows.index, np.int32),
        requests=tuple(request for request, _ in plan),
        sampled=tuple(rows.sampled),
        sampled_rows=tuple(rows.sampled_rows),
        prompt_rows=tuple(rows.prompts),
    )


class RowBudget:
    """Rows of logits that a step may still have; every sequence in it keeps one for its token."""

    def __init__(self, num_rows: int, num_sequences: int) -> None:
        self.spare = num_rows - num_sequences

    def most_tokens(self, request: Request) -> int:
        """How many tokens a request that wants rows of its prompt may compute at most."""
        # Each token from the first row that is missing gives one, up to the prompt's last.
        return max(0, request.num_prompt_rows - request.num_computed) + 1 + self.spare

    def take(self, request: Request, count: int) -> None:
        """A request that wants rows of its prompt computes so many tokens."""
        first = max(request.num_computed, request.num_prompt_rows)
        self.spare -= max(0, request.num_computed + count - first - 1)
