"""What launches assume of steps: looked at when a plan is opened, and again for each step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from ....ir.errors import ArtifactError, CapacityError
from ....ir.launches import Extent, Form, Integer, Launch, LaunchPlan, TensorMap
from ....ir.manifest import CompiledProgram
from ...scheduling.step import Step
from .arrays import greatest_sizes
from .memory import table_widths

_MOST_BLOCKS: Final = (2**31 - 1, 65535, 65535)
"""Of a grid, along each axis, on every GPU."""
_MOST_INTEGER: Final = 2**31 - 1


class StepFacts:
    """The limits of steps for which every launch of a plan is right.

    ArtifactError where the launches do not fit the limits that the artifact states.
    """

    def __init__(self, plan: LaunchPlan, program: CompiledProgram, where: str) -> None:
        self.greatest = greatest_sizes(program)
        self._longest = program.limits.max_context
        self._widths = plan.table_width
        self._groups = tuple(group.name for group in program.resources)
        for problem in self._problems(plan, program):
            raise ArtifactError(
                f"the launches {problem}", where=where, hint="the artifact is damaged: compile it"
                " again",
            )  # fmt: skip

    def check(self, step: Step) -> None:
        """CapacityError for a step beyond the limits, for which launches would be wrong."""
        adjusted = 0 if step.adjustments is None else len(step.adjustments.rows)
        sizes = {
            **{"T": step.num_tokens, "R": len(step.logits_index), "B": step.num_sequences},
            **{"D": len(step.draws), "P": len(step.carried), "L": step.num_logits},
            "A": adjusted,
        }
        for name, size in sizes.items():
            if size > self.greatest[name]:
                raise CapacityError(
                    f"a step with {name} = {size} exceeds the compiled limit {self.greatest[name]}"
                )
        longest = int(step.context_lengths.max(initial=0))
        if longest > self._longest:
            raise CapacityError(
                f"a step with a context of {longest} tokens exceeds the compiled limit"
                f" {self._longest}"
            )
        for name, table in zip(self._groups, step.block_tables, strict=True):
            if table.shape[1] > self._widths[name]:
                raise CapacityError(
                    f"a step with {table.shape[1]} blocks of a sequence in group {name} exceeds"
                    f" the compiled limit {self._widths[name]}"
                )

    def _problems(self, plan: LaunchPlan, program: CompiledProgram) -> Iterator[str]:
        for group, width in table_widths(program).items():
            if plan.table_width.get(group, -1) < width:
                yield f"have no block table of {width} blocks for group {group}"
        greatest = self.greatest
        for tokens, one_query in (
            (greatest["T"], False),
            (min(greatest["B"], greatest["T"]), True),
        ):
            try:
                plan.form(tokens, one_query=one_query)
            except LookupError as error:
                yield f"do not have all forms: {error}"
        for form in plan.forms:
            if form.query_tile < 1 or form.max_tokens < 1:
                yield f"have a form {form.name} for {form.max_tokens} tokens in tiles of" \
                    f" {form.query_tile}"  # fmt: skip
            for place, launch in enumerate(form.launches):
                for problem in self._wrong(form, launch):
                    yield f"{problem}: forms.{form.name}.launches[{place}], {launch.kernel}"

    def _wrong(self, form: Form, launch: Launch) -> Iterator[str]:
        """What is wrong with one launch in the largest step that its form is for."""
        integers = [one.value for one in launch.arguments if isinstance(one, Integer)]
        shapes = [one.shape for one in launch.arguments if isinstance(one, TensorMap)]
        extents = [*launch.grid, *integers, *(extent for shape in shapes for extent in shape)]
        unknown = [one.size for one in extents if one.size not in {None, *self.greatest}]
        if unknown:
            yield f"depend on {unknown[0]!r}, which is no size of a step"
            return
        for extent, most in zip(launch.grid, _MOST_BLOCKS, strict=False):
            if not 0 <= (count := self._largest(form, extent)) <= most:
                yield f"have a grid of {count} blocks, and a GPU has at most {most}"
        for extent in integers:
            if abs(count := self._largest(form, extent)) > _MOST_INTEGER:
                yield f"pass {count} as an integer of 32 bits"

    def _largest(self, form: Form, extent: Extent) -> int:
        """An extent in the largest step of a form: it grows with its size."""
        sizes = dict(self.greatest)
        sizes["T"] = min(sizes["T"], form.max_tokens)
        if form.one_query:
            sizes["B"] = min(sizes["B"], form.max_tokens)
        return extent.evaluate(sizes)
