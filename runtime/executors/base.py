"""What runs a step: the one protocol of all backends, and what it is opened with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ...ir.errors import InfcError
from ..sampling.draws import Draw
from ..sampling.sampler import drawn_token
from ..scheduling.step import NO_TOKEN, Step

WeightPlacement = Literal["mapped", "copied", "loaded"]
"""Where weights lie: in the mapped file; there at first, and copied into memory of huge pages
beside the steps; read into memory before the first step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorConfig:
    """How to open an executor. `num_blocks` has one entry a KV group, the null block included."""

    num_blocks: tuple[int, ...]
    num_threads: int = 1
    pin: bool = False
    weights: WeightPlacement = "loaded"
    profile: bool = False
    """Measure each statement of a step, where the executor can: see `ProfiledExecutor`."""


class Executor(Protocol):
    """Runs steps, and keeps the KV cache that they read and write."""

    def run(self, step: Step) -> NDArray[np.float32]:
        """Compute the step's tokens; the logits of the wanted rows, float32 `[L, vocab]`.

        `step.tokens` is filled, and `step.hidden` where it is given. For a step without
        `needs_head` the head need not be computed.
        """
        ...

    def close(self) -> None:
        """Give threads and memory back; a second call does nothing."""
        ...


@dataclass(frozen=True, slots=True)
class ProfileEntry:
    """What one statement of a step took in all steps so far, and how often it ran.

    `nodes` are the labels of what it computes; statements that only wait have none. A statement
    in a loop over layers has one entry for all of them.
    """

    name: str
    nodes: tuple[str, ...]
    nanoseconds: int
    count: int


@runtime_checkable
class ProfiledExecutor(Executor, Protocol):
    """An executor that can tell where the time of its steps went."""

    def profile(self) -> list[ProfileEntry]:
        """The entries in the order of a step; empty where it was not opened to measure."""
        ...


@runtime_checkable
class WorksAhead(Executor, Protocol):
    """An executor that can make later steps faster while there is nothing to run."""

    def work_ahead(self, seconds: float) -> bool:
        """Do what it can for about so long; whether any of it is left. Not beside `run`."""
        ...


def work_ahead(executor: Executor, seconds: float = math.inf) -> bool:
    """Let the executor work ahead, if it is one that can; whether any of that is left."""
    return isinstance(executor, WorksAhead) and executor.work_ahead(seconds)


def wanted_rows(step: Step, logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """From `logits` of every row, `[R, vocab]`, what `run` gives; fills `step.tokens`.

    For executors whose head makes every row.
    """
    for place, entry in enumerate(step.draws):
        draw = Draw(*entry.item())
        token = drawn_token(logits[draw.row], draw)
        step.tokens[place] = NO_TOKEN if token is None else token
    return logits if step.logits_rows is None else logits[step.logits_rows]


def check_hidden(step: Step, width: int | None) -> None:
    """Assert that `step.hidden` can be filled; InfcError where the artifact has nothing for it."""
    if step.hidden is None:
        return
    if width is None:
        raise InfcError(
            "this artifact does not provide hidden states",
            hint="compile it again; a model whose head is not found has none",
        )
    assert step.hidden.shape == (len(step.logits_index), width), step.hidden.shape
    assert step.hidden.dtype == np.float32 and step.hidden.flags.c_contiguous
