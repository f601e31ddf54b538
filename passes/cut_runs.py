"""Whole runs of models of any size: the same passes over a few layers and the head, compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from ..ir.errors import InfcError, Terminated
from ..ir.ops import PHASES
from ..ir.program import Program
from ..ir.quantized_pairs import QuantizedPairs
from .base import REACHES, Pass, PassContext, phases_ending
from .compare import Distance
from .cut_program import choose_layers, cut_program, layer_keys, layers_of
from .whole_runs import MAX_FLOPS, WholeRuns, run_flops

MAX_CUT_FLOPS: Final = 1_500_000_000_000
"""Runs of a few layers that take more are not made: a minute or two each."""


@dataclass(frozen=True, slots=True)
class CutReport:
    """What was compared, a line each, and how far each lossy pass (by its place) went."""

    lines: Sequence[str]
    distances: Mapping[int, Distance] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CutStep:
    """A pass over the cut program, and the phase that is over after it."""

    one: Pass
    before: Program
    after: Program
    matched: bool
    phase: str | None


def check_cut(
    captured: Program,
    final: Program,
    passes: Sequence[Pass],
    context: PassContext,
    pairs: QuantizedPairs,
) -> CutReport:
    """PassError unless the first layer of each kind, the last and the head agree all the way.

    The passes run over these layers alone, and whole runs before and after are compared. Every
    layer of the whole program that the passes left in the form of one that ran is covered by it;
    the report names those that are not.
    """
    if not passes:
        return CutReport([])
    found = _what_runs(captured, final, passes, context)
    if isinstance(found, str):
        return CutReport([f"not compared as a whole, {found}"])
    first, what, steps = found
    runs = WholeRuns(pairs, what)
    runs.start(first)
    lines: list[str] = []
    distances: dict[int, Distance] = {}
    for index, step in enumerate(steps):
        if step.matched and step.one.contract == "lossy":
            moved = runs.rebase(step.before, step.after, step.one.name)
            if moved is not None:
                distances[index] = moved
        # Later phases hold what earlier ones did: one comparison says it of all since the last.
        if step.phase is not None and (step.after.resources or index + 1 == len(steps)):
            lines.append(runs.check(step.phase, step.after))
    return CutReport([*lines, _coverage(final, steps[-1].after).text], distances)


def _what_runs(
    captured: Program, final: Program, passes: Sequence[Pass], context: PassContext
) -> tuple[Program, str, list[CutStep]] | str:
    """The program to run, its name in reports, and what each pass makes of it; or why none runs.

    It is the cut one where that stands for every layer; else the whole one, if its runs are not
    too long; else the cut one for the layers that it does stand for.
    """
    kept = choose_layers(captured, final)
    what = f"layers {spell_layers(kept)} of {len(layers_of(captured))} and the head"
    partial: tuple[Program, str, list[CutStep]] | None = None
    cut = cut_program(captured, kept)
    if isinstance(cut, str):
        reason = f"{what} cannot run alone: {cut}"
    elif run_flops(cut) > MAX_CUT_FLOPS:
        reason = f"a run of {what} takes {run_flops(cut) / 1e9:.0f} GFLOP"
    else:
        steps = rewritten(cut, passes, context)
        if isinstance(steps, str):
            reason = f"a pass fails on {what} alone: {steps}"
        elif _coverage(final, steps[-1].after).is_full:
            return cut, what, steps
        else:
            reason, partial = "", (cut, what, steps)
    if run_flops(captured) <= MAX_FLOPS:
        steps = rewritten(captured, passes, context)
        if not isinstance(steps, str):
            return captured, "the whole model", steps
        reason = reason or f"a pass fails when it is run again: {steps}"
    return partial or reason


def rewritten(
    program: Program, passes: Sequence[Pass], context: PassContext
) -> list[CutStep] | str:
    """What each pass makes of the program, or how one fails."""
    silent = context.quietly()
    steps = []
    try:
        for one, phase in zip(passes, phases_ending(passes), strict=True):
            result = one.run(program, silent)
            after = result.program
            if phase is not None and PHASES.index(after.phase) < PHASES.index(REACHES[phase]):
                after = replace(after, phase=REACHES[phase])
            steps.append(CutStep(one, program, after, result.matches > 0, phase))
            program = after
    except Terminated:
        raise
    except (Exception, SystemExit) as error:  # a user's pass may raise anything here
        return str(error) if isinstance(error, InfcError) else f"{type(error).__name__}: {error}"
    return steps


@dataclass(frozen=True, slots=True)
class _Coverage:
    """Whether each layer of the final program is equal to one that ran, in words too."""

    is_full: bool
    text: str


def _coverage(final: Program, ran: Program) -> _Coverage:
    known = set(layer_keys(ran).values())
    keys = layer_keys(final)
    layers = layers_of(final)
    unlike = [layer for layer in layers if keys[layer] not in known]
    if unlike:
        return _Coverage(
            False,
            f"layers {spell_layers(unlike)} are unlike any that ran; of them only regions without"
            " paged state were compared",
        )
    if None in keys and keys[None] not in known:
        text = "what is in no layer was rewritten otherwise; its regions were compared"
        return _Coverage(False, text)
    return _Coverage(True, f"each of the {len(layers)} layers is equal to one that ran")


def spell_layers(layers: Sequence[int]) -> str:
    """Numbers of layers for reports: "0, 1, 7"."""
    return ", ".join(map(str, layers))
