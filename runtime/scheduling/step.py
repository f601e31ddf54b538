"""The step: what the scheduler hands the executor for one iteration (`docs/design/step.md`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..sampling.draws import Draws, no_draws

if TYPE_CHECKING:
    from ..requests.request import Request

Int32Array = NDArray[np.int32]

NO_TOKEN = -1
"""What `Step.tokens` holds where a row of logits has a NaN, or no finite maximum."""


def _no_tokens() -> Int32Array:
    return np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Rows of the step's `R` that belong to a prompt.

    Row `first_row + i` is what follows position `first_position + i`, for `count` rows.
    """

    request: Request
    first_row: int
    first_position: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """A ragged batch of `B` sequences, `T` tokens and `R` rows of logits; int32, contiguous.

    The tuples `block_tables`, `slots` and `block_copies` have one entry a KV group, in the order
    of the manifest. `requests` (one a sequence) say whose step it is, `sampled` who gets a token
    of which row (`sampled_rows`), and `prompt_rows` which rows are of a prompt; executors never
    look at them. They write `tokens`, what each of the `D` draws takes (or `NO_TOKEN`), and
    `hidden` where it is given: what enters the head.
    """

    token_ids: Int32Array  # [T]
    positions: Int32Array  # [T]
    query_starts: Int32Array  # [B + 1]
    context_lengths: Int32Array  # [B]
    block_tables: tuple[Int32Array, ...]  # [B, W] each
    slots: tuple[Int32Array, ...]  # [T] each
    block_copies: tuple[Int32Array, ...]  # [C, 2] each, C may differ from group to group
    logits_index: Int32Array  # [R]
    logits_rows: Int32Array | None = None  # [L] of the R whose logits are wanted; None for all
    draws: Draws = field(default_factory=no_draws, repr=False)  # [D]
    tokens: Int32Array = field(default_factory=_no_tokens, repr=False)  # [D]
    hidden: NDArray[np.float32] | None = field(default=None, repr=False)  # [R, hidden_width]
    requests: tuple[Request, ...] = field(default=(), repr=False)
    sampled: tuple[Request, ...] = field(default=(), repr=False)
    sampled_rows: tuple[int, ...] = ()
    prompt_rows: tuple[PromptRows, ...] = field(default=(), repr=False)

    @property
    def num_tokens(self) -> int:
        """Tokens computed by this step."""
        return len(self.token_ids)

    @property
    def num_sequences(self) -> int:
        """Sequences in this step."""
        return len(self.context_lengths)

    @property
    def num_logits(self) -> int:
        """Rows of logits that are wanted."""
        return len(self.logits_index if self.logits_rows is None else self.logits_rows)

    @property
    def needs_head(self) -> bool:
        """Whether anybody wants logits, or tokens from them."""
        return len(self.draws) > 0 or self.num_logits > 0

    def place(self, row: int) -> int:
        """Where this row, of which logits are wanted, stands among those."""
        return row if self.logits_rows is None else int(np.searchsorted(self.logits_rows, row))


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What one step held and took: `seconds` in all, `executor_seconds` of them in the executor."""

    num_sequences: int
    num_tokens: int
    num_sampled: int
    seconds: float
    executor_seconds: float

    @classmethod
    def of(cls, step: Step, seconds: float, executor_seconds: float) -> StepTimes:
        """The times of `step`."""
        return cls(
            step.num_sequences,
            step.num_tokens,
            # Whoever only reads a prompt has a row here, and gets no token.
            sum(request.max_total_tokens > request.num_prompt_tokens for request in step.sampled),
            seconds,
            executor_seconds,
        )
