"""Compares a source on text with what lossy passes left of it, and with the artifact itself."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..ir.freed_memory import release_memory
from ..ir.machine import available_cpus
from .evaluate import open_for_window, step_rows, window_rows
from .tally import Tally, log_softmax, perplexity

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from ..ir.artifact import Artifact
    from ..ir.program import Program
    from ..ir.quantized_pairs import QuantizedPairs
    from ..passes.lossy_stages import LossyRuns, TextBudget
    from ..passes.text_runs import OnShare, TextRunner, Window
    from .progress import Reporter
    from .texts import TokenText

    Rows = NDArray[np.float64]

EMBEDDINGS: Final = "the embeddings"
HEAD: Final = "the head"
WINDOW: Final = 512
"""Tokens of a window of text, unless the context is shorter."""
MAX_TOKENS: Final = 2048
LEAST_TOKENS: Final = 128
MAX_RUN_FLOPS: Final = 400_000_000_000
"""What running one program on text may take: a few seconds."""
_ROWS: Final = 16
"""Rows of logits that are compared at a time, in float64."""
_STEP_ROWS: Final = 64
"""Rows of logits of the artifact that are there at once, in float64."""


def text_budget(context: int, num_tokens: int) -> TextBudget:
    """How much of a text is run, by a model of so many tokens of context."""
    from ..passes.lossy_stages import TextBudget

    return TextBudget(MAX_RUN_FLOPS, LEAST_TOKENS, num_tokens, min(WINDOW, context))


@dataclass(frozen=True, slots=True)
class Figures:
    """How far predictions are from those of the source, in nats, over `tokens` predicted tokens."""

    kl_mean: float
    kl_p99: float
    top1: float
    perplexity: float
    source_perplexity: float
    tokens: int

    @property
    def perplexity_increase(self) -> float:
        """Relative to the source's: 0.01 is one per cent."""
        return self.perplexity / self.source_perplexity - 1

    def as_data(self) -> dict[str, float | int | str]:
        """As plain data, with so many digits as hardly ever depend on the machine."""
        return {
            "kl_mean": rounded(self.kl_mean),
            "kl_p99": rounded(self.kl_p99),
            "top1": rounded(self.top1, 4),
            "perplexity": rounded(self.perplexity, 5),
            "source_perplexity": rounded(self.source_perplexity, 5),
            "perplexity_increase": rounded(self.perplexity_increase),
            "tokens": self.tokens,
        }


@dataclass(frozen=True, slots=True)
class StageEvidence:
    """How far all passes up to a lossy one (by its place) went from the source.

    `errors` has by layer, before them for the embeddings, and for the head, how far what it hands
    on is from what the source has there: the root mean square over tokens of the relative error of
    a token's values.
    """

    index: int
    name: str
    figures: Figures
    errors: tuple[tuple[str, float], ...]

    def origin(self) -> str | None:
        """The place where the error grows most; None where nothing was compared."""
        grown: list[tuple[float, str]] = []
        before = 0.0
        for place, error in self.errors:
            grown.append((error - before if math.isfinite(error) else math.inf, place))
            before = error
        return max(grown, key=lambda pair: pair[0])[1] if grown else None

    def as_data(self) -> dict[str, Any]:
        """As plain data."""
        errors = [{"place": place, "error": rounded(error)} for place, error in self.errors]
        return {"pass": self.name, **self.figures.as_data(), "errors": errors}


@dataclass(frozen=True, slots=True)
class Evidence:
    """Of a compilation: each lossy pass on what ran, and the artifact itself where it could run.

    `what` says what ran, `is_whole` whether it was the whole model; `reason` why the artifact did
    not run.
    """

    what: str
    tokens: int
    stages: tuple[StageEvidence, ...]
    artifact: Figures | None
    reason: str | None = None
    is_whole: bool = True

    @property
    def figures(self) -> Figures | None:
        """Those that count: of the artifact, else of what the last lossy pass left."""
        return self.artifact or (self.stages[-1].figures if self.stages else None)


def rounded(number: float, digits: int = 3) -> float | str:
    """JSON has neither infinity nor NaN: as text."""
    return float(f"{number:.{digits}g}") if math.isfinite(number) else str(number)


@dataclass(slots=True)
class _Errors:
    """Sums of the squared relative errors of a value's rows."""

    total: float = 0.0
    rows: int = 0

    def add(self, expected: torch.Tensor, actual: torch.Tensor, num_rows: int) -> None:
        a, b = (t.reshape(num_rows, -1).double() for t in (expected, actual))
        scale = a.square().sum(1).clamp_min(1e-60)
        self.total += float(((a - b).square().sum(1) / scale).sum())
        self.rows += num_rows

    def mean(self) -> float:
        return math.sqrt(self.total / self.rows) if self.total >= 0 else math.nan


@dataclass(slots=True)
class _Runner:
    """A program that runs beside the source, and what was found of it."""

    runner: TextRunner
    values: dict[int, str]
    tally: Tally = field(default_factory=Tally)
    errors: dict[str, _Errors] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program, pairs: QuantizedPairs, handed_on: Mapping[int, str]) -> _Runner:
        """Watches what layers hand on, where the program still has it before rows are chosen."""
        from ..passes.text_runs import (
            BEFORE_LAYERS,
            TextRunner,
            embedded_value,
            values_before_rows,
        )

        there = values_before_rows(program)
        values = {layer: name for layer, name in handed_on.items() if name in there}
        # Passes rename it where they narrow or quantize the table.
        own = embedded_value(program)
        if BEFORE_LAYERS in handed_on and own is not None and own.name in there:
            values = {BEFORE_LAYERS: own.name} | values  # places are in the order of the model
        return cls(TextRunner(program, pairs, frozenset(values.values())), values)

    def compare_values(self, window: Window, source: _Runner, theirs: Window) -> None:
        """Add the errors of what layers hand on, where both programs have it."""
        from ..passes.text_runs import BEFORE_LAYERS

        for layer, name in self.values.items():
            if layer not in source.values:
                continue
            expected, actual = theirs.values[source.values[layer]], window.values[name]
            if expected.numel() == actual.numel():
                place = EMBEDDINGS if layer == BEFORE_LAYERS else f"layer {layer}"
                found = self.errors.setdefault(place, _Errors())
                found.add(expected, actual, window.num_tokens)

    def compare_rows(self, mine: Rows, theirs: Rows, targets: Sequence[int]) -> None:
        """Add the logarithms of probabilities, of whose logits a common shift says nothing."""
        import torch

        self.tally.add_logarithms(mine, theirs, targets)
        a, b = (torch.from_numpy(x - x.mean(axis=1, keepdims=True)) for x in (theirs, mine))
        self.errors.setdefault(HEAD, _Errors()).add(a, b, len(a))


def gather_evidence(
    runs: LossyRuns,
    text: TokenText,
    pairs: QuantizedPairs,
    artifact: Artifact | str,
    progress: Reporter,
    window: int,
) -> Evidence:
    """Compares all that ran with the source over the same windows, in memory for one of them.

    `artifact` is run as it will be served, or is the reason why it cannot be.
    """
    from ..passes.text_runs import layer_outputs

    text = text.shortened(runs.tokens)
    windows = [one for one in text.windows(window) if len(one) > 1]
    given = {layer: value.name for layer, value in layer_outputs(runs.first).items()}
    source = _Runner.of(runs.first, pairs, given)
    stages = [_Runner.of(stage.program, pairs, runs.handed_on) for stage in runs.stages]
    engine = None if isinstance(artifact, str) else _Engine(artifact, window)
    sides = (source, *stages)
    steps = len(windows) * (len(sides) + (engine is not None))
    bar = _Bar(progress, steps, f"{text.num_tokens} tokens of text")
    # One thread each: the source and what passes made of it do not depend on each other.
    pool = ThreadPoolExecutor(min(len(sides), available_cpus()), thread_name_prefix="infc-text")
    try:
        for one in windows:
            release_memory()  # passes, and the window before, left holes of other sizes
            run = [pool.submit(side.runner.run, one, bar.part()) for side in sides]
            ran = [side.result() for side in run]
            _compare(source, stages, _logits(ran, pool), ran, engine, one)
            bar.finish(len(sides) + (engine is not None))
    finally:
        pool.shutdown(cancel_futures=True)
        if engine is not None:
            engine.close()
    return Evidence(
        runs.what,
        text.num_tokens,
        tuple(
            StageEvidence(stage.index, stage.name, _figures(runner.tally), _ordered(runner.errors))
            for stage, runner in zip(runs.stages, stages, strict=True)
        ),
        None if engine is None else _figures(engine.tally),
        artifact if isinstance(artifact, str) else None,
        runs.is_whole,
    )


class _Engine:
    """The artifact, opened to run windows of text."""

    def __init__(self, artifact: Artifact, window: int) -> None:
        self.tally = Tally()
        self._manifest = artifact.manifest
        opened = ExitStack()
        self._executor = opened.enter_context(open_for_window(artifact, window, None))
        self.close = opened.close

    def rows(self, tokens: Sequence[int]) -> Iterator[Rows]:
        rows = min(_STEP_ROWS, step_rows(self._manifest))
        for logits, _ in window_rows(self._executor, self._manifest, tokens, 1, rows):
            yield logits


class _Bar:
    """Adds up what several threads have done of the steps that there are in all."""

    def __init__(self, progress: Reporter, steps: int, detail: str) -> None:
        self._progress, self._steps, self._detail = progress, steps, detail
        self._lock = threading.Lock()
        self._done = 0
        self._shares: list[float] = []

    def part(self) -> OnShare:
        """What one thread tells about its step."""
        with self._lock:
            place = len(self._shares)
            self._shares.append(0.0)

        def advance(share: float) -> None:
            with self._lock:
                self._shares[place] = share
                self._show()

        return advance

    def finish(self, steps: int) -> None:
        """So many steps are done, those of all threads among them."""
        with self._lock:
            self._done += steps
            self._shares.clear()
            self._show()

    def _show(self) -> None:
        done = self._done + sum(self._shares)
        self._progress.advance(int(1000 * done), 1000 * self._steps, self._detail)


def _logits(ran: Sequence[Window], pool: Executor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Of each window the logits in order, some rows of all of them at a time."""
    parts = [window.logits(range(window.num_tokens - 1)) for window in ran]
    while rows := [
        side for side in pool.map(lambda part: next(part, None), parts) if side is not None
    ]:
        for at in range(0, len(rows[0]), _ROWS):
            yield tuple(side[at : at + _ROWS] for side in rows)


def _compare(
    source: _Runner,
    stages: Sequence[_Runner],
    logits: Iterator[tuple[torch.Tensor, ...]],
    ran: Sequence[Window],
    engine: _Engine | None,
    tokens: Sequence[int],
) -> None:
    for runner, window in zip(stages, ran[1:], strict=True):
        runner.compare_values(window, source, ran[0])
    mine = None if engine is None else _RowStream(engine.rows(tokens))
    at = 0
    for rows in logits:
        theirs, *others = (log_softmax(side.double().numpy()) for side in rows)
        targets = tokens[at + 1 : at + 1 + len(theirs)]
        at += len(theirs)
        for runner, other in zip(stages, others, strict=True):
            runner.compare_rows(other, theirs, targets)
        if engine is not None and mine is not None:
            engine.tally.add_logarithms(log_softmax(mine.take(len(theirs))), theirs, targets)


def _figures(tally: Tally) -> Figures:
    found = tally.divergence()
    count = tally.num_predicted
    mine, theirs = (perplexity(nats, count) for nats in (tally.nats, tally.other_nats))
    return Figures(found.kl_mean, found.kl_p99, found.same_top, mine, theirs, count)


def _ordered(errors: dict[str, _Errors]) -> tuple[tuple[str, float], ...]:
    return tuple((place, found.mean()) for place, found in errors.items())


class _RowStream:
    """Rows that come in parts of any size, to be taken in parts of another."""

    def __init__(self, parts: Iterable[Rows]) -> None:
        self._rows = (row for part in parts for row in part)

    def take(self, count: int) -> Rows:
        """The next ones; fewer at the end."""
        return np.stack(list(islice(self._rows, count)))
