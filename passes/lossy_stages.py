"""What lossy passes made of a program, in a form that can be run beside the first one on text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..ir.program import Program
from .base import Pass, PassContext
from .cut_program import choose_layers, cut_program, layers_of
from .cut_runs import rewritten, spell_layers
from .text_runs import layer_outputs, window_flops
from .whole_runs import not_runnable


@dataclass(frozen=True, slots=True)
class LossyStage:
    """The program that a lossy pass (by its place in the pipeline) left."""

    index: int
    name: str
    program: Program


@dataclass(frozen=True, slots=True)
class LossyRuns:
    """The first program and what each lossy pass left; all of them can be run on text.

    `what` says what it is: "the whole model", or the layers of a cut one. `tokens` is how many
    tokens may be run with it, at most. `handed_on` names by layer what it gives to the next one, in
    the stages: passes keep the names of values, but may move them to nodes of another layer.
    """

    first: Program
    stages: tuple[LossyStage, ...]
    handed_on: Mapping[int, str]
    what: str
    is_whole: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class TextBudget:
    """What a run of one program on text may cost: operations, and tokens between two bounds."""

    flops: int
    least_tokens: int
    most_tokens: int
    window: int

    def tokens(self, program: Program) -> int:
        """So many tokens may run of a program; 0 if those are too few to say anything."""
        each = max(1, window_flops(program, self.window, self.window) // self.window)
        count = min(self.most_tokens, self.flops // each)
        return count if count >= min(self.least_tokens, self.most_tokens) else 0


def choose_runs(
    first: Program,
    final: Program,
    passes: Sequence[Pass],
    context: PassContext,
    stages: Sequence[LossyStage],
    budget: TextBudget,
) -> LossyRuns | str:
    """The whole model where that is not too long, else a cut one; or why neither can be run.

    `first` is what the passes were given.
    Passes that follow the lowering of the KV cache are left out: their programs need paged state.
    """
    kept = tuple(stage for stage in stages if not stage.program.resources)
    programs = (first, *(stage.program for stage in kept))
    if reason := next(filter(None, map(not_runnable, programs)), None):
        return reason
    if tokens := budget.tokens(first):
        return LossyRuns(first, kept, _handed_on(first), "the whole model", True, tokens)
    layers = choose_layers(first, final)
    what = f"layers {spell_layers(layers)} of {len(layers_of(first))} and the head"
    cut = cut_program(first, layers)
    if isinstance(cut, str):
        return f"{what} cannot run alone: {cut}"
    if not (tokens := budget.tokens(cut)):
        return f"a run of {what} takes too long"
    steps = rewritten(cut, passes, context)
    if isinstance(steps, str):
        return f"a pass fails on {what} alone: {steps}"
    wanted = {stage.index: stage for stage in kept}
    cut_stages = tuple(
        replace(wanted[index], program=step.after)
        for index, step in enumerate(steps)
        if index in wanted
    )
    return LossyRuns(cut, cut_stages, _handed_on(cut), what, False, tokens)


def _handed_on(program: Program) -> dict[int, str]:
    return {layer: value.name for layer, value in layer_outputs(program).items()}
