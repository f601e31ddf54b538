"""What a calibrated method is given: tokens, where to keep what it makes, whom to tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...ir.quantized_pairs import QuantizedPairs
from .feedback import CompiledFeedback
from .spill import SpillFile


def _unheard(done: int, total: int, detail: str) -> None:
    """The progress of a calibration that nobody watches."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Windows of token ids, each of which a model reads from position 0; and a place for results.

    `description` says in reports what the text was (its SHA-256). `made` has what was made of
    every matrix, by what its parts are of: the same passes run again over a few of the layers, and
    take it from there. `channels` says in the same way of each group of products, by its first
    matrix, whether its channels are scaled. `advance` is told how much of the work is done. `pairs`
    rounds what is not calibrated. `compiled` has schemes that compiled code rounds to with
    feedback, which takes a fraction of the time.
    """

    windows: Sequence[Sequence[int]]
    spill: SpillFile
    description: Mapping[str, Any] = field(default_factory=dict)
    advance: Callable[[int, int, str], None] = _unheard
    made: dict[str, str] = field(default_factory=dict)
    channels: dict[str, bool] = field(default_factory=dict)
    pairs: QuantizedPairs = field(default_factory=QuantizedPairs)
    compiled: Mapping[str, CompiledFeedback] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """How many tokens there are in all windows."""
        return sum(map(len, self.windows))
