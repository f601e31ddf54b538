"""How many blocks those that run will come to need, guessed from how long answers have been."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Sequence

import numpy as np

from ..requests.request import Request
from .kv_groups import blocks_for

_MEMORY = 256  # answers
_SHARE_OF_PEAK = 0.5  # kept free: some end early, and a preemption now and then does no harm


class AnswerLengths:
    """Tokens of the answers that ended last, and what they say of one that is being written."""

    def __init__(self) -> None:
        self._latest: deque[int] = deque()
        self._sorted: list[int] = []

    def add(self, num_tokens: int) -> None:
        """Take in an answer that has ended."""
        if len(self._latest) == _MEMORY:
            oldest = self._latest.popleft()
            del self._sorted[bisect_right(self._sorted, oldest) - 1]
        self._latest.append(num_tokens)
        insort(self._sorted, num_tokens)

    def expected_more(self, num_tokens: int, most: int) -> int:
        """How many an answer of `num_tokens` may still get, of `most` that are allowed.

        As many as those got, on average, that were longer; where none was, as many again. None
        as long as nothing is known.
        """
        if not self._sorted:
            return 0
        longer = self._sorted[bisect_right(self._sorted, num_tokens) :]
        mean = sum(longer) // len(longer) - num_tokens if longer else num_tokens
        return min(most, max(1, mean))


class Demand:
    """Blocks to keep free for sequences that run, so that they need not preempt each other."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._lengths = AnswerLengths()
        self._num_ends = 0
        self._known: tuple[Request, int, int] | None = None
        self._blocks = 0

    def note_end(self, num_output_tokens: int | None) -> None:
        """Somebody gives blocks back; with the length of an answer that is whole."""
        self._num_ends += 1
        if num_output_tokens is not None:
            self._lengths.add(num_output_tokens)

    def blocks_beside(self, running: Sequence[Request], newcomer: Request, num_choices: int) -> int:
        """What they should find free once `newcomer` and `num_choices` of its choices run.

        As long as nobody gives anything back that is what it was, less what they got since:
        it is not worked out again for the same newcomer.
        """
        if self._known != (newcomer, num_choices, self._num_ends):
            self._known = (newcomer, num_choices, self._num_ends)
            self._blocks = int(_SHARE_OF_PEAK * self._peak(running, newcomer, num_choices))
        return self._blocks

    def _peak(self, running: Sequence[Request], newcomer: Request, num_choices: int) -> int:
        """The most blocks that they are expected to hold at once beyond those of their tokens.

        All get a token a step, and the shortest ends first: only just before an end is it most.
        """
        size, expected = self._block_size, self._lengths.expected_more
        tokens, more, owned = [], [], []
        for request in (*running, newcomer):
            length = len(request.token_ids)
            left = request.max_total_tokens - length
            shared = request.blocks.num_taken
            choices = (request, *request.unforked)
            for choice in choices[:num_choices] if request is newcomer else choices:
                tokens.append(length)
                more.append(expected(choice.num_output_tokens, left))
                owned.append(0 if request.unforked else blocks_for(length, size) - shared)
        stored, ends = np.array(tokens), np.array(more)[:, None]
        grown = -(-(stored + ends) // size) - -(-stored // size)
        alive = np.array(more) >= ends
        return max(0, int(np.where(alive, grown, -np.array(owned)).sum(axis=1).max()))
