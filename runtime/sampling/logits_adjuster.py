"""What a request does to its logits before they are sampled: bias, penalties, masks, constraint."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ...ir.errors import InfcError
from .sampling_params import SamplingParams
from .top_tokens import Logits

_Ids = NDArray[np.intp]
_DENSE = 16
"""A list of more than one in so many tokens is kept as a whole row."""


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

    __slots__ = ("_counts", "_ids", "_left_out", "_places", "_taken")

    def __init__(self, start: int = 0, left_out: Collection[int] = frozenset()) -> None:
        """Counts from index `start` of the list on, but not the tokens `left_out`."""
        self._taken = start
        self._left_out = left_out
        self._places: dict[int, int] = {}
        self._ids = np.zeros(16, np.intp)
        self._counts = np.zeros(16, np.float32)

    def update(self, token_ids: Sequence[int]) -> tuple[_Ids, Logits]:
        """Take in what was added to the list; its distinct ids, and their counts."""
        for token in token_ids[self._taken :]:
            if token in self._left_out:
                continue
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token
            self._counts[place] += 1
        self._taken = len(token_ids)
        size = len(self._places)
        return self._ids[:size], self._counts[:size]


class _Edits:
    """What parameters and prompt do to every row, as arrays: one for all choices of a request."""

    __slots__ = ("_allowed", "_banned", "_bias", "_bias_ids", "_dense_bias", "_masked", "ends",
                 "prompt", "prompt_ids")  # fmt: skip

    def __init__(self, params: SamplingParams, end_token_ids: Iterable[int]) -> None:
        pairs = params.bias_pairs
        self._bias_ids = np.fromiter((token for token, _ in pairs), np.intp, len(pairs))
        self._bias = np.fromiter((bias for _, bias in pairs), np.float32, len(pairs))
        allowed = params.allowed_token_ids
        self._allowed = None if allowed is None else np.array(allowed, np.intp)
        self._banned = np.array(params.banned_token_ids, np.intp)
        self.ends = np.array(sorted(end_token_ids), np.intp)
        self.prompt: frozenset[int] | None = None
        self.prompt_ids: _Ids = np.zeros(0, np.intp)
        # Long lists are much faster as what they do to a whole row, whose length a row says.
        self._dense_bias: Logits | None = None
        self._masked: NDArray[np.bool_] | None = None

    def take_prompt(self, token_ids: Sequence[int]) -> None:
        """Take in the distinct tokens of the prompt."""
        self.prompt = frozenset(token_ids)
        self.prompt_ids = np.array(sorted(self.prompt), np.intp)

    def add_bias(self, row: Logits) -> None:
        """Add the bias to a row [V]."""
        if len(self._bias) * _DENSE < len(row):
            row[self._bias_ids] += self._bias
            return
        if self._dense_bias is None:
            self._dense_bias = np.zeros(len(row), np.float32)
            self._dense_bias[self._bias_ids] = self._bias
        row += self._dense_bias

    def mask(self, row: Logits) -> None:
        """Keep what is allowed of a row [V], and nothing that is banned."""
        if self._allowed is None and len(self._banned) * _DENSE < len(row):
            row[self._banned] = -np.inf
            return
        if self._masked is None:
            self._masked = np.full(len(row), self._allowed is not None)
            if self._allowed is not None:
                self._masked[self._allowed] = False
            self._masked[self._banned] = True
        np.putmask(row, self._masked, -np.inf)


class LogitsAdjuster:
    """Steps 1 to 4 of `SamplingParams`, for one completion. Its state follows from its tokens."""

    __slots__ = ("_edits", "_new", "_num_prompt_tokens", "_output", "_params", "constraint")

    def __init__(
        self,
        params: SamplingParams,
        num_prompt_tokens: int,
        end_token_ids: Iterable[int],
        constraint: TokenConstraint | None = None,
        *,
        edits: _Edits | None = None,
    ) -> None:
        self._params = params
        self._num_prompt_tokens = num_prompt_tokens
        self._edits = _Edits(params, end_token_ids) if edits is None else edits
        self._new: TokenCounts | None = None  # of the output, what the prompt has not
        self._output = TokenCounts(num_prompt_tokens)
        self.constraint = constraint

    def fork(self) -> LogitsAdjuster:
        """One for another completion of the request, of which nothing has been generated."""
        constraint = None if self.constraint is None else self.constraint.fork()
        return LogitsAdjuster(
            self._params, self._num_prompt_tokens, (), constraint, edits=self._edits
        )

    def take_prompt(self, token_ids: Sequence[int]) -> None:
        """Prepare for the tokens of a request, prompt first, as the first row would else."""
        if self._params.repetition_penalty != 1.0:
            self._edits.take_prompt(token_ids[: self._num_prompt_tokens])

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
        self._edits.add_bias(row)
        if params.repetition_penalty != 1.0:
            self._penalise_repeated(row, token_ids, params.repetition_penalty)
        if params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
            ids, counts = self._output.update(token_ids)
            row[ids] -= counts * params.frequency_penalty
            row[ids] -= params.presence_penalty

    def _penalise_repeated(self, row: Logits, token_ids: Sequence[int], penalty: float) -> None:
        if self._edits.prompt is None:
            self.take_prompt(token_ids)
        assert self._edits.prompt is not None
        if self._new is None:
            self._new = TokenCounts(self._num_prompt_tokens, self._edits.prompt)
        for ids in (self._edits.prompt_ids, self._new.update(token_ids)[0]):
            scores = row[ids]
            row[ids] = np.where(scores < 0, scores * penalty, scores / penalty)

    def _mask(self, row: Logits, token_ids: Sequence[int]) -> None:
        self._edits.mask(row)
        if len(token_ids) - self._num_prompt_tokens < self._params.min_tokens:
            row[self._edits.ends] = -np.inf
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
    raise ConstraintError(f"the constraint {name} returned {given}, not bool [{size}]")
