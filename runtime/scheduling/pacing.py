"""How long steps take, and how much of prompts fits into one that others wait for."""

from __future__ import annotations

_WEIGHT = 0.2  # of the newest step in what is known
_LARGEST_SURPRISE = 2.0  # times what was expected: more is the machine's pause, not the step's
_LEAST_SECONDS = 1e-9  # a token of a prompt takes time, whatever was measured
_GRAIN = 16  # tokens; kernels take rows of a prompt in groups


class Pacer:
    """The budget of a step, so that whoever waits for its next token waits about `target_seconds`.

    A step with one token a sequence takes `fixed` seconds, and each further token, which is a
    prompt's, `per_token` more: both are running means of what steps took, moved by a bounded
    share of each. A prompt always gets `_GRAIN` tokens of a step, also where the target cannot be
    kept, so nobody starves. The times decide how a prompt is cut, and that changes nobody's
    tokens (`docs/design/reduction-order.md`).
    """

    def __init__(self, target_seconds: float) -> None:
        self._target_seconds = target_seconds
        self._fixed: float | None = None
        self._per_token: float | None = None

    def budget(self, num_sequences: int, most: int) -> int:
        """Tokens of a step in which so many sequences run, some of them beyond their prompt."""
        if self._per_token is None:
            return most
        spare_seconds = self._target_seconds - (self._fixed or 0.0)
        # Bounded first: what is next to nothing a token would be next to infinitely many.
        spare = int(max(0.0, min(spare_seconds / self._per_token, float(most))))
        return min(most, num_sequences + max(_GRAIN, spare // _GRAIN * _GRAIN))

    def observe(self, num_sequences: int, num_tokens: int, seconds: float) -> None:
        """Take in what a step took."""
        further = num_tokens - num_sequences
        if further == 0:
            self._fixed = _moved(self._fixed, seconds)
        elif further >= _GRAIN:  # of fewer, noise would be divided by next to nothing
            rest = (seconds - (self._fixed or 0.0)) / further
            self._per_token = _moved(self._per_token, max(rest, _LEAST_SECONDS))


def _moved(mean: float | None, seconds: float) -> float:
    if mean is None:
        return seconds
    return mean + _WEIGHT * (min(seconds, _LARGEST_SURPRISE * mean) - mean)
