"""One executor made of two: both run every step, and the first one's tokens go on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ...runtime.executors.base import Executor, Finished, run_step
from ...runtime.scheduling.step import Float32Array, Step, StepOutput
from .report import Speed, Stretch, Worst

_MOST_STRETCHES = 16


@dataclass(slots=True)
class Clock:
    """What the steps of one executor took, by their kind."""

    prefill: Speed = field(default_factory=lambda: Speed(0, 0.0))
    decode: Speed = field(default_factory=lambda: Speed(0, 0.0))

    def add(self, step: Step, seconds: float) -> None:
        """Count a step; it decodes if each of its sequences computes one token."""
        name = "decode" if step.num_tokens == step.num_sequences else "prefill"
        before: Speed = getattr(self, name)
        setattr(self, name, Speed(before.tokens + step.num_tokens, before.seconds + seconds))


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
        self.steps = self.mixed_steps = 0

    def launch(self, step: Step) -> Finished:
        """Compute the step on both."""
        whole = replace(step, logits_rows=None)
        outputs: list[StepOutput | None] = [None, None]
        for at in (0, 1) if self.steps % 2 == 0 else (1, 0):
            given = self._translations[at](whole)
            begun = time.perf_counter()
            outputs[at] = run_step(self._executors[at], given)
            self.clocks[at].add(step, time.perf_counter() - begun)
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
