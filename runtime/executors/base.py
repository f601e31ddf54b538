"""What runs a step: the one protocol of all backends, and what it is opened with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol, runtime_checkable

import numpy as np

from ...ir.errors import InfcError
from ...ir.manifest import MAIN
from ..sampling.adjustments import Mask, adjusted_row
from ..sampling.draws import Draw
from ..sampling.sampler import drawn_token, greatest_token
from ..scheduling.step import NO_TOKEN, Float32Array, Step, StepOutput

WeightPlacement = Literal["mapped", "copied", "loaded"]
"""Where weights lie: in the mapped file; there at first, and copied into memory of huge pages
beside the steps; read into memory before the first step."""


HOST: Final = "host"
"""The kind of memory that every process has; executors may name others."""

DEVICE: Final = "device"
"""The kind of memory that a GPU has of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorConfig:
    """How to open an executor of one of the artifact's programs.

    `num_blocks` has one entry a KV group, the null block included.
    """

    num_blocks: tuple[int, ...]
    num_threads: int = 1
    pin: bool = False
    weights: WeightPlacement = "loaded"
    program: str = MAIN
    profile: bool = False
    """Measure each statement of a step, where the executor can: see `ProfiledExecutor`."""


class Running(Protocol):
    """A step that was launched. It runs also where nobody asks for its result."""

    def result(self) -> StepOutput:
        """Wait for the step; what it returned, or raised."""
        ...


class Executor(Protocol):
    """Runs steps, and keeps the KV cache that they read and write.

    `depth` is how many more steps it takes while one runs. With 0, a step is launched once the one
    before it has returned, and no step has `carried` tokens.
    """

    depth: int

    def launch(self, step: Step) -> Running:
        """Start to compute the step's tokens. Steps run one after the other, in this order.

        For a step without `needs_head` the head need not be computed. An executor may also compute
        the whole step here. What is wrong with a step is raised here or by `Running.result`.
        """
        ...

    def close(self) -> None:
        """Give threads and memory back, once what runs has ended; a second call does nothing."""
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
class ReportsMemory(Protocol):
    """An executor that knows how much of its memory it has touched."""

    def touched_bytes(self) -> Mapping[str, int]:
        """By kind of memory (such as HOST), bytes that the system no longer calls free.

        May be called while a step runs, from another thread.
        """
        ...


@runtime_checkable
class TakesLateMasks(Protocol):
    """An executor that computes logits while masks of some rows are still to come.

    Its steps may have `Adjustments.num_late` such masks. They are given once for each step that
    runs, or will, also where nobody wants its result.
    """

    def give_masks(self, running: Running, masks: Mask) -> None:
        """Give the late masks `[num_late, ceil(V / 32)]` of a step, which it may wait for."""
        ...


@runtime_checkable
class WorksAhead(Protocol):
    """An executor that can make later steps faster while there is nothing to run."""

    def work_ahead(self, seconds: float) -> bool:
        """Do what it can for about so long; whether any of it is left. Not while a step runs."""
        ...


def work_ahead(executor: Executor, seconds: float = math.inf) -> bool:
    """Let the executor work ahead, if it is one that can; whether any of that is left."""
    return isinstance(executor, WorksAhead) and executor.work_ahead(seconds)


def run_step(executor: Executor, step: Step) -> StepOutput:
    """Launch a step and wait for it."""
    return executor.launch(step).result()


@dataclass(slots=True)
class Finished:
    """A step that was computed when it was launched."""

    output: StepOutput

    def result(self) -> StepOutput:
        """What the step returned."""
        return self.output


def head_output(step: Step, logits: Float32Array, hidden: Float32Array | None) -> StepOutput:
    """What a step returns whose head gave `logits` [R, vocab] and `hidden` [R, hidden_width].

    For executors whose head makes every row. Carried tokens are in their places in `token_ids`.
    """
    tokens = np.empty(len(step.draws), np.int32)
    adjusted = {} if step.adjustments is None else step.adjustments.places()
    for place, entry in enumerate(step.draws):
        draw = Draw(*entry.item())
        row: Float32Array | None = logits[draw.row]
        if place in adjusted:
            row = _adjusted(step, draw, adjusted[place], logits[draw.row])
        token = None if row is None else drawn_token(row, draw)
        tokens[place] = NO_TOKEN if token is None else token
    wanted = logits if step.logits_rows is None else logits[step.logits_rows]
    return StepOutput(tokens, wanted, hidden if step.wants_hidden else None)


def _adjusted(step: Step, draw: Draw, place: int, logits: Float32Array) -> Float32Array | None:
    """The adjusted row of a draw; None where the row that came has no finite maximum."""
    if greatest_token(logits) is None:
        return None
    assert step.adjustments is not None
    last = int(step.logits_index[draw.row])
    carried = int(step.token_ids[last]) if last in step.carried[:, 0] else None
    return adjusted_row(logits, step.adjustments, place, carried)


def check_hidden(step: Step, width: int | None) -> None:
    """InfcError where the step wants hidden states and the artifact has none."""
    if step.wants_hidden and width is None:
        raise InfcError(
            "this artifact does not provide hidden states",
            hint="compile it again; a model whose head is not found has none",
        )


def check_rows(step: Step, logits_of_tokens: bool) -> None:
    """InfcError where the program gives logits of every token, and the step wants those of some."""
    rows = len(step.logits_index)
    if logits_of_tokens and rows != step.num_tokens:
        raise InfcError(
            f"this program gives logits of every token, and a step of {step.num_tokens} tokens has "
            f"{rows} rows"
        )


def check_draws(step: Step, vocab_size: int | None) -> None:
    """InfcError where tokens are to be drawn and the program gives no logits."""
    if len(step.draws) and vocab_size is None:
        raise InfcError("tokens cannot be drawn: this program gives no logits")
