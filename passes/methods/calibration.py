"""What a calibrated method is given: tokens, where to keep what it makes, whom to tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...ir.program import Program, WeightLoader
from ...ir.quantized_pairs import QuantizedPairs
from ...ir.text import print_expr
from ...ir.weights import is_read_alike
from .feedback import CompiledFeedback
from .spill import SpillFile

if TYPE_CHECKING:
    import torch


def _unheard(done: int, total: int, detail: str) -> None:
    """The progress of a calibration that nobody watches."""


def figure(number: float) -> float | str:
    """An error for reports, in three digits; as text if it is not finite, which JSON has not."""
    return float(f"{number:.3g}") if math.isfinite(number) else str(number)


@dataclass(frozen=True, slots=True)
class MadeWeight:
    """The key in the spill file of what was made of a weight, and the loaders behind that."""

    key: str
    loaders: Mapping[str, WeightLoader]


@dataclass(frozen=True, slots=True)
class ScaledGroup:
    """Whether the channels of a group are scaled; its content, and the loaders behind that."""

    is_scaled: bool
    content: str
    loaders: Mapping[str, WeightLoader]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Windows of token ids, each of which a model reads from position 0; and a place for results.

    `description` says in reports what the text was (its SHA-256). `made` has what was made of
    every matrix, by what its parts are of: the same passes run again over a few of the layers, and
    take it from there. `channels` says in the same way of each group of products, by its first
    matrix, whether its channels are scaled. `is_added` is for a program beside the model's step: it
    takes over what was made of the same weights, read by the same loaders, and nothing is made for
    it, as it may be no step that could be run on the windows. `advance` is told how much of the
    work is done. `pairs` rounds what is not calibrated. `compiled` has schemes that compiled code
    rounds to with feedback, which takes a fraction of the time.
    """

    windows: Sequence[Sequence[int]]
    spill: SpillFile
    description: Mapping[str, Any] = field(default_factory=dict)
    advance: Callable[[int, int, str], None] = _unheard
    made: dict[str, MadeWeight] = field(default_factory=dict)
    channels: dict[str, ScaledGroup] = field(default_factory=dict)
    is_added: bool = False
    pairs: QuantizedPairs = field(default_factory=QuantizedPairs)
    compiled: Mapping[str, CompiledFeedback] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """How many tokens there are in all windows."""
        return sum(map(len, self.windows))

    @property
    def has_results(self) -> bool:
        """Whether any weight was made, or any channel scaled."""
        return bool(self.made) or any(group.is_scaled for group in self.channels.values())

    def keep(self, program: Program, entry: str, tensor: torch.Tensor) -> None:
        """Keeps what was made of an entry of the weight table."""
        self.spill.write(entry, tensor)
        expr = program.weights[entry].expr
        self.made[print_expr(expr)] = MadeWeight(entry, program.loaders)

    def key(self, program: Program, entry: str) -> str | None:
        """The key of what was made of an entry of the weight table; None where nothing was."""
        expr = program.weights[entry].expr
        found = self.made.get(print_expr(expr))
        if found is None:
            return None
        # Layers of the model that run alone may read through other loaders: the tensors are equal.
        is_same = not self.is_added or is_read_alike(expr, program.loaders, found.loaders)
        return found.key if is_same else None
