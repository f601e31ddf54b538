"""Steps: what an executor gets for one iteration, and what it returns (see docs/design/step.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..sampling.adjustments import Adjustments
from ..sampling.draws import Draws, no_draws

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]
Array = Int32Array | Float32Array

NO_TOKEN = -1
"""What `StepOutput.tokens` holds where a row of logits has a NaN, or no finite maximum."""

NO_PAIRS: Final = np.zeros((0, 2), np.int32)
"""No block copies, or no carried tokens."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Step:
    """A ragged batch of `B` sequences, `T` tokens and `R` rows of logits; int32, contiguous.

    The tuples `block_tables`, `slots` and `block_copies` have one entry a KV group, in the order
    of the manifest. There is nothing but arrays and one flag, so a step can be sent to another
    process (`step_bytes.py`); whose tokens they are is in `StepOwners`.

    A step that is launched before the one before it has returned may compute tokens that only the
    executor knows. `carried` gives the place of each in `token_ids`, which is 0 there, and the draw
    of the step launched before this one that it comes from. `NO_TOKEN` is computed as token 0:
    its sequence ends when that step is settled, and what is computed for it here is dropped.

    `adjustments` is None where no draw has any. `inputs` are the arrays that the program takes
    beside those of every step, by name; a program may take them alone, and no tokens.
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
    adjustments: Adjustments | None = None
    wants_hidden: bool = False  # whether the R inputs of the head are wanted
    carried: Int32Array = field(default_factory=lambda: NO_PAIRS)  # [P, 2] (place in T, draw)
    inputs: Mapping[str, Array] = field(default_factory=dict)

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
        """Whether logits are wanted, or tokens from them."""
        return len(self.draws) > 0 or self.num_logits > 0

    def place(self, row: int) -> int:
        """Where this row, of which logits are wanted, stands among those."""
        return row if self.logits_rows is None else int(np.searchsorted(self.logits_rows, row))


@dataclass(slots=True, eq=False)
class StepOutput:
    """What a step returns.

    `tokens` [D] are the sampled tokens, one a draw (or `NO_TOKEN`), `logits` [L, vocab] the
    wanted rows of logits, and `hidden` [R, hidden_width] the inputs of the head, None unless the
    step wants them. `others` are what the program gives beside, by name.
    """

    tokens: Int32Array
    logits: Float32Array
    hidden: Float32Array | None = None
    others: Mapping[str, Array] = field(default_factory=dict)
