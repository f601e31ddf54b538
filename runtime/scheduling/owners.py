"""Whose step it is: what of a step stays in the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..requests.request import Request
from .kv_cache import StepBlocks
from .step import Step


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
class StepOwners:
    """The requests behind the arrays of a step.

    `requests` has one entry a sequence. `sampled` are those that get a token, and `sampled_rows`
    the rows of the step's `R` that it comes from: the completions of one request share the last
    row of the prompt. `prompt_rows` are the rows for log-probabilities and pooling of prompts.
    """

    requests: tuple[Request, ...]
    sampled: tuple[Request, ...] = ()
    sampled_rows: tuple[int, ...] = ()
    prompt_rows: tuple[PromptRows, ...] = ()

    @property
    def want_hidden(self) -> bool:
        """Whether any of them pools hidden states."""
        return any(request.pool is not None for request in self.sampled) or any(
            rows.request.pool is not None for rows in self.prompt_rows
        )


@dataclass(slots=True, eq=False)
class PlannedStep:
    """A step, its owners, and what is noted of its blocks until it has run."""

    step: Step
    owners: StepOwners
    blocks: StepBlocks | None = None

    def late_masks(self) -> list[Request]:
        """Whose masks come while the step runs, in their order."""
        adjustments = self.step.adjustments
        if adjustments is None or not adjustments.num_late:
            return []
        is_late = adjustments.rows["mask"] >= len(adjustments.masks)
        drawn = [request for request in self.owners.sampled if request.pool is None]
        return [drawn[draw] for draw in adjustments.rows["draw"][is_late].tolist()]


@dataclass(frozen=True, slots=True)
class StepTimes:
    """What one step held and took: `seconds` in all, `executor_seconds` of them in the executor.

    `token_gaps` are the seconds since the token before, of each token but the first of a sequence,
    and how many had each.
    """

    num_sequences: int
    num_tokens: int
    num_sampled: int
    seconds: float
    executor_seconds: float
    token_gaps: Mapping[float, int]

    @classmethod
    def of(
        cls,
        planned: PlannedStep,
        seconds: float,
        executor_seconds: float,
        token_gaps: Mapping[float, int],
    ) -> StepTimes:
        """The times of a step."""
        return cls(
            planned.step.num_sequences,
            planned.step.num_tokens,
            # Whoever only reads a prompt has a row here, and gets no token.
            sum(not request.is_read_only for request in planned.owners.sampled),
            seconds,
            executor_seconds,
            token_gaps,
        )
