"""How a step is launched: by which form, with which sizes, and whether as captured graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from ....ir.errors import CapacityError
from ....ir.launches import LaunchPlan, When
from ...scheduling.step import Int32Array, Step
from .arrays import GENERATION, padded
from .launching import ReadyForm
from .step_arrays import query_tiles

_ROWS: Final = tuple(1 << power for power in range(20))
"""Sizes to which what a step in pieces has beside its tokens is padded."""
_GREEDY: Final[frozenset[When]] = frozenset({"always", "head", "draws"})
_USUAL: Final[tuple[frozenset[When], ...]] = (_GREEDY, _GREEDY | {"sampled"})
"""What most steps need: a greedy one, and one in which some sequence is not."""
_NO_TILES: Final = (np.zeros(0, np.int32), np.zeros(0, np.int32))


@dataclass(frozen=True, slots=True)
class StepShape:
    """A step's form, its sizes with padding, what it needs, and whether it is captured."""

    form: ReadyForm
    sizes: dict[str, int]
    active: frozenset[When]
    captured: bool


class StepShapes:
    """Chooses the shapes of steps."""

    def __init__(
        self,
        plan: LaunchPlan,
        forms: Mapping[str, ReadyForm],
        greatest: Mapping[str, int],
        *,
        capture: bool,
    ) -> None:
        self._plan, self._forms, self._greatest = plan, forms, greatest
        self._buckets = plan.buckets if capture else ()
        self._pieces = plan.pieces if capture else ()

    def of(
        self, step: Step, further: Mapping[str, int]
    ) -> tuple[StepShape, tuple[Int32Array, Int32Array]]:
        """The shape of a step whose further symbols have these sizes, and its tiles of queries."""
        tokens, sequences = step.num_tokens, step.num_sequences
        one_query = tokens > 0 and tokens == sequences
        form = self._form(tokens, one_query=one_query)
        tiles = (
            _NO_TILES
            if form.form.one_query
            else query_tiles(step.query_starts, form.form.query_tile)
        )
        a = step.adjustments
        sizes = {
            **further,
            "T": tokens,
            "R": len(step.logits_index),
            "B": sequences,
            "D": len(step.draws),
            "A": 0 if a is None else len(a.rows),
            "L": step.num_logits,
            "P": len(step.carried),
            "C": max(map(len, step.block_copies), default=0),
            "tiles": len(tiles[0]),
            GENERATION: 0,
        }
        active = _needs(step, sizes)
        if form.form.one_query:
            captured = self._pad_to_bucket(sizes, form.form.max_tokens)
        else:
            captured = self._pad_to_piece(sizes, form.form.max_tokens)
        return StepShape(form, sizes, active, captured), tiles

    def usual(self) -> Iterator[StepShape]:
        """The shapes of most steps of one query each, the largest first."""
        for bucket in reversed(self._buckets):
            if bucket > min(self._greatest[name] for name in "TBRD"):
                continue
            form = self._form(bucket, one_query=True)
            if form.form.one_query:
                sizes = dict.fromkeys(("T", "B", "R", "D", "P"), bucket)
                sizes |= dict.fromkeys(("A", "L", "C", "tiles", GENERATION), 0)
                for active in _USUAL:
                    yield StepShape(form, sizes.copy(), active, captured=True)

    def _form(self, tokens: int, *, one_query: bool) -> ReadyForm:
        try:
            return self._forms[self._plan.form(tokens, one_query=one_query).name]
        except LookupError as error:
            raise CapacityError(f"the artifact cannot run this step: {error}") from None

    def _pad_to_bucket(self, sizes: dict[str, int], most: int) -> bool:
        """Make all sizes those of the step's bucket; whether it has one.

        Tokens are always carried: a pair more or less must not need another graph.
        """
        wanted = max(sizes[name] for name in "TRDLP")
        most = min(most, *(self._greatest[name] for name in "TBP"))
        bucket = padded(wanted, self._buckets, most)
        if not self._buckets or wanted > min(self._buckets[-1], most):
            return False
        for name in "TBP":
            sizes[name] = bucket
        for name in "RDLA":
            if sizes[name]:
                sizes[name] = min(bucket, self._greatest[name])
        if sizes["A"]:  # there is a record for each draw
            sizes["A"] = sizes["D"]
        return True

    def _pad_to_piece(self, sizes: dict[str, int], most: int) -> bool:
        """Make the tokens those of the step's pieces; whether it has any."""
        if not self._pieces or not 0 < sizes["T"] <= self._pieces[-1]:
            return False
        sizes["T"] = padded(sizes["T"], self._pieces, min(most, self._greatest["T"]))
        for name in "BRDLP":
            sizes[name] = padded(sizes[name], _ROWS, self._greatest[name])
        if sizes["A"]:
            sizes["A"] = sizes["D"]
        return True


def _needs(step: Step, sizes: Mapping[str, int]) -> frozenset[When]:
    """Which launches the step needs."""
    holds: dict[When, bool] = {
        "always": True,
        "copies": sizes["C"] > 0,
        "head": step.needs_head,
        "draws": sizes["D"] > 0,
        "sampled": bool(step.draws["temperature"].any()),
        "adjusted": sizes["A"] > 0,
        "logits": sizes["L"] > 0,
        "hidden": step.wants_hidden,
    }
    return frozenset(when for when, held in holds.items() if held)
