"""One executor made of two: both run every step, and the first one's tokens go on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ...runtime.executors.base import Executor, Finished, run_step
from ...runtime.scheduling.step import Float32Array, Step, StepOutput
from .report import Speed, Stretch, Worst

_MOST_STRETCHES = 16


Kind = Literal["prefill", "decode"]


def kind_of(step: Step) -> Kind:
    """A step decodes if each of its sequences computes one token."""
    return "decode" if step.num_tokens == step.num_sequences else "prefill"


@dataclass(slots=True)
class Clock:
    """What the steps of one executor took, by their kind."""

    prefill: Speed = field(default_factory=lambda: Speed(0, 0.0))
    decode: Speed = field(default_factory=lambda: Speed(0, 0.0))

    def add(self, kind: Kind, tokens: int, seconds: float) -> None:
        """Count a step."""
        before: Speed = getattr(self, kind)
        setattr(self, kind, Speed(before.tokens + tokens, before.seconds + seconds))


class PairedExecutor:
    """Runs each step on two executors, compares all rows of logits, and returns the first's.

    `translations` make the step of each from the one that was scheduled. Who goes first changes
    from step to step, as the second finds other things in the processor's caches.
    """

    depth = 0

    def __init__(
        self, executors: Sequence[Executor], translations: Sequence[Callable[[Step], Step]]
    ) -> None:
        self._executors, self._translations = tuple(executors), tuple(translations)
        self.start_anew()

    def start_anew(self) -> None:
        """Forget what was found so far."""
        self.rows = Rows()
        self.clocks = (Clock(), Clock())
        # By kind, and by who went first.
        self._ratios: dict[tuple[Kind, int], list[float]] = {}
        self.steps = self.mixed_steps = 0

    def launch(self, step: Step) -> Finished:
        """Compute the step on both."""
        whole = replace(step, logits_rows=None)
        kind = kind_of(step)
        seconds = [0.0, 0.0]
        outputs: list[StepOutput | None] = [None, None]
        first_at = self.steps % 2
        for at in (first_at, 1 - first_at):
            given = self._translations[at](whole)
            begun = time.perf_counter()
            outputs[at] = run_step(self._executors[at], given)
            seconds[at] = time.perf_counter() - begun
            self.clocks[at].add(kind, step.num_tokens, seconds[at])
        ratios = self._ratios.setdefault((kind, first_at), [])
        ratios.append(seconds[0] / max(seconds[1], 1e-9))
        self.steps += 1
        counts = np.diff(step.query_starts)
        self.mixed_steps += bool((counts == 1).any() and (counts > 1).any())
        first, second = outputs
        assert first is not None
        assert second is not None
        if step.needs_head:
            places = step.positions[step.logits_index]
            self.rows.add(places, first.logits, second.logits)
        if step.logits_rows is not None:
            first.logits = first.logits[step.logits_rows]
        return Finished(first)

    def ratio(self, kind: Kind) -> float:
        """How much faster the second was in steps of a kind; 0 without any.

        Both run a step one right after the other, so that what else the machine does is alike. Of
        the steps that each began there is a median, and of both a mean, as ratios have one.
        """
        given = [self._ratios[kind, at] for at in (0, 1) if (kind, at) in self._ratios]
        medians = [float(np.median(ratios)) for ratios in given]
        return math.prod(medians) ** (1 / len(medians)) if medians else 0.0

    def close(self) -> None:
        """Both are closed by whoever opened them."""


class Rows:
    """The errors of rows of logits, and whether their most likely tokens are equal."""

    def __init__(self) -> None:
        self._positions: list[NDArray[np.int32]] = []
        self._errors: list[NDArray[np.float64]] = []
        self._tops: list[NDArray[np.int64]] = []

    def add(self, positions: NDArray[np.int32], first: Float32Array, second: Float32Array) -> None:
        """Rows `[n, V]` of both at the same positions."""
        a, b = first.astype(np.float64), second.astype(np.float64)
        with np.errstate(invalid="ignore"):
            difference, largest = np.abs(b - a).max(1, initial=0), np.abs(a).max(1, initial=0)
            errors = np.where(difference == 0, 0.0, difference / np.maximum(largest, 1e-30))
        finite = np.isfinite(a).all(1) & np.isfinite(b).all(1)
        self._positions.append(np.array(positions))
        self._errors.append(np.where(finite, errors, np.inf))
        self._tops.append(np.stack([a.argmax(1), b.argmax(1)], axis=1))

    @property
    def errors(self) -> NDArray[np.float64]:
        """Of all rows, in the order of steps."""
        return np.concatenate(self._errors)

    @property
    def same(self) -> NDArray[np.bool_]:
        """Whether the most likely tokens of a row are equal, and its logits are finite."""
        tops = np.concatenate(self._tops)
        same: NDArray[np.bool_] = (tops[:, 0] == tops[:, 1]) & np.isfinite(self.errors)
        return same

    def worst(self) -> Worst:
        """The row with the largest error."""
        at = int(self.errors.argmax())
        tops = np.concatenate(self._tops)[at]
        place = int(np.concatenate(self._positions)[at])
        return Worst(place, float(self.errors[at]), (int(tops[0]), int(tops[1])))

    def stretches(self) -> tuple[Stretch, ...]:
        """All rows by their positions, in stretches of one length."""
        places, errors, same = np.concatenate(self._positions), self.errors, self.same
        length = -(-(int(places.max()) + 1) // _MOST_STRETCHES)
        found = []
        for first in range(0, int(places.max()) + 1, length):
            inside = (places >= first) & (places < first + length)
            if inside.any():
                found.append(
                    Stretch(
                        first,
                        min(first + length - 1, int(places.max())),
                        int(inside.sum()),
                        float(np.median(errors[inside])),
                        float(errors[inside].max()),
                        int(same[inside].sum()),
                    )
                )
        return tuple(found)
