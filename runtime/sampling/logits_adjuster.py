"""What a request does to its logits before they are sampled: bias, penalties, masks, constraint."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...ir.errors import InfcError
from .adjustments import LATE, NO_BIAS, NO_IDS, Adjustment, Ints, Mask, packed
from .sampling_params import SamplingParams
from .top_tokens import Logits

_DENSE = 64
"""A list of more than one in so many tokens takes fewer bytes as a mask than as entries."""


class TokenConstraint(Protocol):
    """Says which tokens may come next, as a grammar does. One object serves one completion.

    It is asked before each token, in the order of the tokens. What it raises ends its completion,
    and no other.
    """

    def mask(self, output_ids: Sequence[int]) -> NDArray[np.bool_] | Mask:
        """Which tokens of the vocabulary may follow the output so far.

        Bool `[V]`, or uint32 `[ceil(V / 32)]` with token i as bit `i % 32` of word `i // 32`.
        It is copied. It is asked for again after the same output only where a step failed.
        """
        ...

    def rollback(self, num_tokens: int) -> None:
        """Go back by the last `num_tokens` tokens of the output that it was last asked about.

        The next output that it is asked about begins with what is left.
        """
        ...

    def fork(self) -> TokenConstraint:
        """Another in the state of the empty output, for another completion of the request."""
        ...


class ConstraintError(InfcError):
    """A constraint that raised, or whose mask is none; it ends the completion that it is of."""


class _Edits:
    """What parameters and prompt do to every row, as arrays: one for all choices of a request."""

    __slots__ = ("bias", "first_bias", "mask", "prompt", "prompt_ids", "vocab_size")

    def __init__(
        self, params: SamplingParams, end_token_ids: Iterable[int], vocab_size: int | None
    ) -> None:
        self.vocab_size = vocab_size
        self.mask = _listed_mask(params, vocab_size)
        entries = dict(params.bias_pairs)
        if self.mask is None:
            entries |= dict.fromkeys(params.banned_token_ids, -math.inf)
        self.bias = _as_arrays(entries)
        # Of an output shorter than `min_tokens`, which must not end.
        ends = dict.fromkeys(end_token_ids, -math.inf) if params.min_tokens else {}
        self.first_bias = _as_arrays(entries | ends) if ends else self.bias
        self.prompt: Mapping[int, int] = {}
        self.prompt_ids: Ints = NO_IDS

    def take_prompt(self, token_ids: Sequence[int]) -> None:
        """Take in the distinct tokens of the prompt: they are repeated when they come again."""
        distinct = sorted(set(token_ids))
        self.prompt_ids = np.array(distinct, np.int32)
        self.prompt = dict(zip(distinct, range(len(distinct)), strict=True))


def _as_arrays(entries: Mapping[int, float]) -> tuple[Ints, Logits]:
    if not entries:
        return NO_IDS, NO_BIAS
    ids = np.fromiter(entries, np.int32, len(entries))
    return ids, np.fromiter(entries.values(), np.float32, len(entries))


def _listed_mask(params: SamplingParams, vocab_size: int | None) -> Mask | None:
    """The mask of the lists of a request; None where short entries say it all."""
    allowed, banned = params.allowed_token_ids, params.banned_token_ids
    if allowed is None and len(banned) * _DENSE <= (vocab_size or math.inf):
        return None
    assert vocab_size is not None, "masks have the size of the vocabulary"
    listed = np.full(vocab_size, allowed is None)
    if allowed is not None:
        listed[np.array(allowed, np.intp)] = True
    listed[np.array(banned, np.intp)] = False
    return packed(listed)


class TokenCounts:
    """The distinct tokens of prompt and output, and how often each is in the output."""

    __slots__ = ("_counts", "_ids", "_new", "_output", "_prompt")

    def __init__(self, prompt_ids: Ints, prompt: Mapping[int, int]) -> None:
        """Counts for an empty output. `prompt` has the places of the tokens `prompt_ids`."""
        self._prompt = prompt
        self._new: dict[int, int] = {}  # places of what the prompt has not
        self._output: list[int] = []
        size = len(prompt_ids)
        self._ids = np.zeros(size + 16, np.int32)
        self._ids[:size] = prompt_ids
        self._counts = np.zeros(size + 16, np.int32)

    @property
    def num_output(self) -> int:
        """Tokens of the output that are counted."""
        return len(self._output)

    def arrays(self) -> tuple[Ints, Ints]:
        """The tokens and their counts, until the next change."""
        size = len(self._prompt) + len(self._new)
        return self._ids[:size], self._counts[:size]

    def append(self, token_ids: Iterable[int]) -> None:
        """Count tokens that were added to the output."""
        for token in token_ids:
            place = self._prompt.get(token)
            if place is None:
                size = len(self._prompt) + len(self._new)
                place = self._new.setdefault(token, size)
                if place == len(self._ids):
                    self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                    self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
                self._ids[place] = token
            self._counts[place] += 1
            self._output.append(token)

    def remove(self, num_tokens: int) -> None:
        """Take back the last tokens of the output."""
        for _ in range(num_tokens):
            token = self._output.pop()
            place = self._prompt.get(token, self._new.get(token))
            assert place is not None
            self._counts[place] -= 1
            if not self._counts[place] and token in self._new:
                del self._new[token]  # the last place: what came later has been taken back


class LogitsAdjuster:
    """Steps 1 to 4 of `SamplingParams`, for one completion. Its state follows from its tokens.

    `error` says what went wrong, once something did.
    """

    __slots__ = (
        "_asked",
        "_constraint",
        "_counts",
        "_counts_tokens",
        "_edits",
        "_mask",
        "_num_prompt_tokens",
        "_params",
        "error",
    )

    def __init__(
        self,
        params: SamplingParams,
        num_prompt_tokens: int,
        end_token_ids: Iterable[int],
        constraint: TokenConstraint | None = None,
        *,
        vocab_size: int | None = None,
        edits: _Edits | None = None,
    ) -> None:
        """`vocab_size` is needed for lists of tokens, for a constraint, and to fail."""
        self._params = params
        self._num_prompt_tokens = num_prompt_tokens
        self._edits = _Edits(params, end_token_ids, vocab_size) if edits is None else edits
        self._counts_tokens = (
            params.repetition_penalty != 1.0
            or params.presence_penalty != 0.0
            or params.frequency_penalty != 0.0
        )
        self._counts: TokenCounts | None = None  # made when it is needed
        self._constraint = constraint
        self._asked = 0  # tokens of the output that the constraint knows
        self._mask: Mask | None = None  # what it said of them
        self.error: str | None = None

    def fork(self) -> LogitsAdjuster:
        """One for another completion of the request, of which nothing has been generated."""
        constraint = None if self._constraint is None else self._constraint.fork()
        return LogitsAdjuster(
            self._params, self._num_prompt_tokens, (), constraint, edits=self._edits
        )

    def take_prompt(self, token_ids: Sequence[int]) -> None:
        """Prepare for the tokens of a request, prompt first; before the first row."""
        if self._params.repetition_penalty != 1.0:
            self._edits.take_prompt(token_ids[: self._num_prompt_tokens])

    def replay(self, output_ids: Sequence[int]) -> None:
        """Ask the constraint about an output that is there already, as if it had come one by one.

        Raises ConstraintError where it fails, or does not allow a token of it.
        """
        constraint, size = self._constraint, self._edits.vocab_size
        if constraint is None:
            return
        assert size is not None
        for length, token in enumerate(output_ids):
            mask = _checked_mask(constraint, output_ids[:length], size)
            self._asked = length
            if not mask[token // 32] >> (token % 32) & 1:
                name = type(constraint).__name__
                raise ConstraintError(
                    f"the constraint {name} does not allow token {token} at place {length}"
                )

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

    def most_unknown(self, *, late_masks: bool) -> float:
        """How many of the tokens before a row may be known to the executor alone.

        It counts the last one itself. What a constraint says follows from all of them, so its mask
        comes late, where the executor takes `late_masks`.
        """
        if self._constraint is not None and not late_masks:
            return 0
        return math.inf if self._constraint is None and not self._counts_tokens else 1

    def adjustment(self, token_ids: Sequence[int], position: int) -> Adjustment:
        """What is done to the row of the token at `position`, after the tokens `token_ids`.

        At most `most_unknown` tokens are missing in between; of a constraint, its mask is `LATE`
        then. One that fails leaves no token, and `error` says how.
        """
        if self.error is not None:
            return self.fail(self.error)
        params, edits = self._params, self._edits
        try:
            mask = edits.mask
            if self._constraint is not None:
                is_late = len(token_ids) < position
                mask = LATE if is_late else self._constrained(self._constraint, token_ids)
        except ConstraintError as error:
            return self.fail(str(error))
        first = position - self._num_prompt_tokens < params.min_tokens
        return Adjustment(
            params.repetition_penalty,
            params.frequency_penalty,
            params.presence_penalty,
            *(edits.first_bias if first else edits.bias),
            *(self._count(token_ids) if self._counts_tokens else (NO_IDS, NO_IDS)),
            mask,
        )

    def fail(self, reason: str) -> Adjustment:
        """Leave no token from now on, so that the completion ends with this error."""
        self.error = reason
        return Adjustment(1.0, 0.0, 0.0, NO_IDS, NO_BIAS, NO_IDS, NO_IDS, self.no_token())

    def no_token(self) -> Mask:
        """The mask that leaves none."""
        size = self._edits.vocab_size
        assert size is not None
        return np.zeros(-(-size // 32), np.uint32)

    def rewind(self, num_output: int) -> None:
        """Go back to the first `num_output` tokens of the output: those behind are taken back."""
        if self._counts is not None:
            self._counts.remove(max(0, self._counts.num_output - num_output))
        if self._constraint is not None and self._asked > num_output:
            self._constraint.rollback(self._asked - num_output)
            self._asked, self._mask = num_output, None

    def _count(self, token_ids: Sequence[int]) -> tuple[Ints, Ints]:
        counts, self._counts = self._counts, None  # what fails half-way is counted anew
        if counts is None:
            counts = TokenCounts(self._edits.prompt_ids, self._edits.prompt)
        counts.append(token_ids[self._num_prompt_tokens + counts.num_output :])
        self._counts = counts
        return counts.arrays()

    def _constrained(self, constraint: TokenConstraint, token_ids: Sequence[int]) -> Mask:
        """The mask of the lists and the constraint."""
        output_ids, size = token_ids[self._num_prompt_tokens :], self._edits.vocab_size
        assert size is not None
        if self._mask is None or self._asked != len(output_ids):
            mask = _checked_mask(constraint, output_ids, size)
            self._mask = mask if self._edits.mask is None else mask & self._edits.mask
            self._asked = len(output_ids)
        return self._mask


def _checked_mask(constraint: TokenConstraint, output_ids: Sequence[int], size: int) -> Mask:
    """The mask [ceil(size / 32)] of a constraint, which is anybody's code."""
    name, num_words = type(constraint).__name__, -(-size // 32)
    try:
        mask: NDArray[Any] = constraint.mask(output_ids)
    except Exception as error:  # whatever it is, the neighbours of its request never notice
        reason = f"{type(error).__name__}: {error}"
        raise ConstraintError(f"the constraint {name} failed: {reason}") from error
    if not isinstance(mask, np.ndarray):
        given = type(mask).__name__
    elif mask.dtype == np.bool_ and mask.shape == (size,):
        return packed(mask)
    elif mask.dtype == np.uint32 and mask.shape == (num_words,):
        return mask.copy()  # others may get the same memory
    else:
        given = f"{mask.dtype} {list(mask.shape)}"
    raise ConstraintError(
        f"the constraint {name} returned {given}, not bool [{size}] or uint32 [{num_words}]"
    )
