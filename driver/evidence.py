"""Compares a source on text with what lossy passes left of it, and with the artifact itself."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .evaluate import open_for_window, step_rows, window_rows
from .tally import Tally, perplexity

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from ..ir.artifact import Artifact
    from ..ir.program import Program
    from ..ir.quantized_pairs import QuantizedPairs
    from ..passes.lossy_stages import LossyRuns, TextBudget
    from ..passes.text_runs import TextRunner, Window
    from .progress import Reporter
    from .texts import TokenText

    Rows = NDArray[np.float64]

HEAD: Final = "the head"
WINDOW: Final = 512
"""Tokens of a window of text, unless the context is shorter."""
MAX_TOKENS: Final = 2048
LEAST_TOKENS: Final = 128
MAX_RUN_FLOPS: Final = 400_000_000_000
"""What running one program on text may take: a few seconds."""
_ROWS: Final = 64


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

    `errors` has by layer, and for the head, how far what it hands on is from what the source has
    there: the root mean square over tokens of the relative error of a token's values.
    """

    index: int
    name: str
    figures: Figures
    errors: tuple[tuple[str, float], ...]

    def origin(self) -> str | None:
        """The layer, or the head, where the error grows most; None where nothing was compared."""
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

    `what` says what ran; `reason` why the artifact did not.
    """

    what: str
    tokens: int
    stages: tuple[StageEvidence, ...]
    artifact: Figures | None
    reason: str | None = None

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
        from ..passes.text_runs import TextRunner, values_before_rows

        there = values_before_rows(program)
        values = {layer: name for layer, name in handed_on.items() if name in there}
        return cls(TextRunner(program, pairs, frozenset(values.values())), values)

    def compare_values(self, window: Window, source: _Runner, theirs: Window) -> None:
        """Add the errors of what layers hand on, where both programs have it."""
        for layer, name in self.values.items():
            if layer not in source.values:
                continue
            expected, actual = theirs.values[source.values[layer]], window.values[name]
            if expected.numel() == actual.numel():
                found = self.errors.setdefault(f"layer {layer}", _Errors())
                found.add(expected, actual, window.num_tokens)

    def compare_rows(self, mine: Rows, theirs: Rows, targets: Sequence[int]) -> None:
        """Add logits, whose common shift says nothing."""
        import torch

        self.tally.add(mine, theirs, targets)
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
    steps = len(windows) * (1 + len(stages) + (engine is not None))
    done = 0

    def share(part: float) -> None:
        progress.advance(
            int(1000 * (done + part)), 1000 * steps, f"{text.num_tokens} tokens of text"
        )

    try:
        for one in windows:
            ran = []
            for runner in (source, *stages):
                ran.append(runner.runner.run(one, share))
                done += 1
            _compare(source, stages, ran, engine, one)
            done += engine is not None
            share(0)
    finally:
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
    )


class _Engine:
    """The artifact, opened to run windows of text."""

    def __init__(self, artifact: Artifact, window: int) -> None:
        self.tally = Tally()
        self._manifest = artifact.manifest
        self._executor = open_for_window(artifact, window, None)
        self.close = self._executor.close

    def rows(self, tokens: Sequence[int]) -> Iterator[Rows]:
        rows = step_rows(self._manifest)
        for logits, _ in window_rows(self._executor, self._manifest, tokens, 1, rows):
            yield logits


def _compare(
    source: _Runner,
    stages: Sequence[_Runner],
    ran: Sequence[Window],
    engine: _Engine | None,
    tokens: Sequence[int],
) -> None:
    for runner, window in zip(stages, ran[1:], strict=True):
        runner.compare_values(window, source, ran[0])
    wanted = range(len(tokens) - 1)
    sides = [
        regrouped((part.double().numpy() for part in window.logits(wanted)), _ROWS)
        for window in ran
    ]
    if engine is not None:
        sides.append(regrouped(engine.rows(tokens), _ROWS))
    at = 0
    for theirs, *others in zip(*sides, strict=True):
        targets = tokens[at + 1 : at + 1 + len(theirs)]
        at += len(theirs)
        for runner, mine in zip(stages, others, strict=False):
            runner.compare_rows(mine, theirs, targets)
        if engine is not None:
            engine.tally.add(others[-1], theirs, targets)


def _figures(tally: Tally) -> Figures:
    found = tally.divergence()
    count = tally.num_predicted
    mine, theirs = (perplexity(nats, count) for nats in (tally.nats, tally.other_nats))
    return Figures(found.kl_mean, found.kl_p99, found.same_top, mine, theirs, count)


def _ordered(errors: dict[str, _Errors]) -> tuple[tuple[str, float], ...]:
    return tuple((place, found.mean()) for place, found in errors.items())


def regrouped(parts: Iterable[Rows], size: int) -> Iterator[Rows]:
    """The same rows, `size` at a time, the last time fewer."""
    rows = (row for part in parts for row in part)
    while group := list(islice(rows, size)):
        yield np.stack(group)
