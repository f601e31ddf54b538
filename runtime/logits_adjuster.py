"""What a request does to its logits before they are sampled: bias, penalties, masks, constraint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..ir.errors import InfcError
from .sampling_params import SamplingParams
from .top_tokens import Logits

_Ids = NDArray[np.intp]


class TokenConstraint(Protocol):
    """Says which tokens may come next, as a grammar does. One object serves one completion.

    Preemption asks nothing again: each row is sampled once, in the order of the tokens. What it
    raises ends its completion, and no other.
    """

    def mask(self, output_ids: Sequence[int]) -> NDArray[np.bool_]:
        """Whether each token of the vocabulary may follow the output so far: bool `[V]`."""
        ...

    def fork(self) -> TokenConstraint:
        """Another in the state of the empty output, for another completion of the request."""
        ...


class ConstraintError(InfcError):
    """A constraint that raised, or whose mask is none; it ends the completion that it is of."""


class TokenCounts:
    """The distinct tokens of a growing list and how often each is in it; reads each token once."""

    __slots__ = ("_counts", "_ids", "_places", "_taken")

    def __init__(self, start: int = 0) -> None:
        """Counts from index `start` of the list on."""
        self._taken = start
        self._places: dict[int, int] = {}
        self._ids = np.zeros(16, np.intp)
        self._counts = np.zeros(16, np.float32)

    def update(self, token_ids: Sequence[int]) -> tuple[_Ids, Logits]:
        """Take in what was added to the list; its distinct ids, and their counts."""
        for token in token_ids[self._taken :]:
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token
            self._counts[place] += 1
        self._taken = len(token_ids)
        size = len(self._places)
        return self._ids[:size], self._counts[:size]


class LogitsAdjuster:
    """Steps 1 to 4 of `SamplingParams`, for one completion. Its state follows from its tokens."""

    __slots__ = (
        "_all",
        "_allowed",
        "_banned",
        "_bias",
        "_bias_ids",
        "_ends",
        "_num_prompt_tokens",
        "_output",
        "_params",
        "constraint",
    )

    def __init__(
        self,
        params: SamplingParams,
        num_prompt_tokens: int,
        end_token_ids: Iterable[int],
        constraint: TokenConstraint | None = None,
    ) -> None:
        self._params = params
        self._num_prompt_tokens = num_prompt_tokens
        self._bias_ids = np.array([token for token, _ in params.bias_pairs], np.intp)
        self._bias = np.array([bias for _, bias in params.bias_pairs], np.float32)
        allowed = params.allowed_token_ids
        self._allowed = None if allowed is None else np.array(allowed, np.intp)
        self._banned = np.array(params.banned_token_ids, np.intp)
        self._ends = np.array(sorted(end_token_ids), np.intp)
        self._all = TokenCounts()
        self._output = TokenCounts(num_prompt_tokens)
        self.constraint = constraint

    @staticmethod
    def is_needed(params: SamplingParams, constraint: TokenConstraint | None = None) -> bool:
        """Whether a request with these parameters changes its logits at all."""
        return (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
            or bool(params.logit_bias)
            or params.allowed_token_ids is not None
            or bool(params.banned_token_ids)
            or params.min_tokens > 0
            or constraint is not None
        )

    def apply(self, logits: Logits, token_ids: Sequence[int]) -> Logits:
        """A changed copy of the row `logits` [V], after the tokens `token_ids` of the request.

        ConstraintError where the constraint gives no mask.
        """
        row = logits.copy()
        self._penalise(row, token_ids)
        self._mask(row, token_ids)
        return row

    def _penalise(self, row: Logits, token_ids: Sequence[int]) -> None:
        params = self._params
        row[self._bias_ids] += self._bias
        if params.repetition_penalty != 1.0:
            ids, _ = self._all.update(token_ids)
            scores, penalty = row[ids], params.repetition_penalty
            row[ids] = np.where(scores < 0, scores * penalty, scores / penalty)
        if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
            ids, counts = self._output.update(token_ids)
            row[ids] -= counts * params.frequency_penalty
            row[ids] -= params.presence_penalty

    def _mask(self, row: Logits, token_ids: Sequence[int]) -> None:
        params = self._params
        if self._allowed is not None:
            kept = row[self._allowed]
            row.fill(-np.inf)
            row[self._allowed] = kept
        row[self._banned] = -np.inf
        if len(token_ids) - self._num_prompt_tokens < params.min_tokens:
            row[self._ends] = -np.inf
        if self.constraint is not None:
            output_ids = token_ids[self._num_prompt_tokens :]
            row[~_checked_mask(self.constraint, output_ids, len(row))] = -np.inf


def _checked_mask(
    constraint: TokenConstraint, output_ids: Sequence[int], size: int
) -> NDArray[np.bool_]:
    """The mask [size] of a constraint, which is anybody's code."""
    name = type(constraint).__name__
    try:
        mask = constraint.mask(output_ids)
    except Exception as error:  # whatever it is, the neighbours of its request never notice
        reason = f"{type(error).__name__}: {error}"
        raise ConstraintError(f"the constraint {name} failed: {reason}") from error
    if not isinstance(mask, np.ndarray):
        given = type(mask).__name__
    elif mask.dtype == np.bool_ and mask.shape == (size,):
        return mask
    else:
        given = f"{mask.dtype} {list(mask.shape)}"
    raise ConstraintError(f"the constraint {name} gave {given}, and a mask is bool [{size}]")
