"""Whole runs of models of any size: the same passes over a few layers and the head, compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from ..ir.errors import InfcError
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
class _Step:
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
    kept = choose_layers(captured, final)
    cut = cut_program(captured, kept)
    what = f"layers {_spell(kept)} of {len(layers_of(captured))} and the head"
    if isinstance(cut, str):
        if run_flops(captured) > MAX_FLOPS:
            return CutReport([f"not compared as a whole, {what} cannot run alone: {cut}"])
        cut, what = captured, "the whole model"
    if run_flops(cut) > MAX_CUT_FLOPS:
        flops = f"{run_flops(cut) / 1e9:.0f} GFLOP"
        return CutReport([f"not compared as a whole, a run of {what} takes {flops}"])
    try:
        steps = _rewrite(cut, passes, context)
    except Exception as error:  # a user's pass may raise anything where layers are missing
        reason = str(error) if isinstance(error, InfcError) else f"{type(error).__name__}: {error}"
        return CutReport([f"not compared as a whole, a pass fails on {what} alone: {reason}"])
    runs = WholeRuns(pairs, what)
    runs.start(cut)
    lines: list[str] = []
    distances: dict[int, Distance] = {}
    for index, step in enumerate(steps):
        if step.matched and step.one.contract == "lossy":
            found = runs.rebase(step.before, step.after, step.one.name)
            if found is not None:
                distances[index] = found
        # Later phases hold what earlier ones did: one comparison says it of all since the last.
        if step.phase is not None and (step.after.resources or index + 1 == len(steps)):
            lines.append(runs.check(step.phase, step.after))
    return CutReport([*lines, _coverage(final, steps[-1].after)], distances)


def _rewrite(program: Program, passes: Sequence[Pass], context: PassContext) -> list[_Step]:
    silent = PassContext(context.target, context.options)
    steps = []
    for one, phase in zip(passes, phases_ending(passes), strict=True):
        result = one.run(program, silent)
        after = result.program
        if phase is not None and PHASES.index(after.phase) < PHASES.index(REACHES[phase]):
            after = replace(after, phase=REACHES[phase])
        steps.append(_Step(one, program, after, result.matches > 0, phase))
        program = after
    return steps


def _coverage(final: Program, ran: Program) -> str:
    """Whether each layer of the final program is equal to one that ran."""
    known = set(layer_keys(ran).values())
    keys = layer_keys(final)
    layers = layers_of(final)
    unlike = [layer for layer in layers if keys[layer] not in known]
    if unlike:
        return (
            f"layers {_spell(unlike)} are unlike any that ran; of them only regions without paged"
            " state were compared"
        )
    if None in keys and keys[None] not in known:
        return "what is in no layer was rewritten otherwise; its regions were compared"
    return f"each of the {len(layers)} layers is equal to one that ran"


def _spell(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))
