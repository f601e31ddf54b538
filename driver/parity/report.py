"""What a comparison of two executors found, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens that steps of one kind computed, and the seconds of the executor in them."""

    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Their ratio; 0 where no such step ran."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two artifacts: its form, how fast it was, and what memory it takes as planned.

    `kv_sequence_bytes` is what a sequence of the whole context takes.
    """

    path: str
    identity: str
    backend: str
    target: str
    matrices: str
    kv_type: str
    block_size: int
    prefill: Speed
    decode: Speed
    weights_bytes: int
    step_bytes: int
    kv_token_bytes: int
    kv_sequence_bytes: int


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows of logits at positions `first` to `last`: how far they are apart.

    The error of a row is the largest difference of a logit, relative to the largest logit of the
    first artifact. It is infinite where either has a logit that is no finite number.
    """

    first: int
    last: int
    rows: int
    error_median: float
    error_max: float
    same_top: int


@dataclass(frozen=True, slots=True)
class Worst:
    """The row with the largest error."""

    position: int
    error: float
    tokens: tuple[int, int]
    """The most likely token of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parity:
    """Two artifacts on the very same steps; all errors are those of the second."""

    model: str
    vocab_size: int
    text: str
    sides: tuple[Side, Side]
    threads: int
    sequences: int
    steps: int
    mixed_steps: int
    cached_tokens: int
    rows: int
    not_finite: int
    error_median: float
    error_max: float
    same_top: int
    worst: Worst
    stretches: tuple[Stretch, ...]
    prefill_ratio: float
    """How much faster the second was: by medians over steps, each run by both; 0 without any."""
    decode_ratio: float

    @property
    def top1(self) -> float:
        """The share of rows with the same most likely token."""
        return self.same_top / self.rows
