"""Whole runs of a program: a prompt at once before lowering, in paged steps after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..ir.analyses import total_cost
from ..ir.errors import CheckpointError, InfcError, PassError, UsageError
from ..ir.ops import Kind, get_op
from ..ir.program import HIDDEN, LOGITS, Program
from ..ir.quantized_pairs import QuantizedPairs
from ..ir.sizes import format_size
from .compare import Distance, difference, distance
from .sample_runs import Cuts, run_paged, run_whole, split_matrices, wanted_rows

if TYPE_CHECKING:
    import torch

    Outputs = tuple[torch.Tensor, ...]

_SPOKEN = {HIDDEN: "hidden states"}
"""Names of outputs as messages have them, where that is another word."""

TOLERANCE = 2e-4
"""Largest error of whole runs in float32: rounding in another order adds up over layers."""
HEAVY_FLOPS = 5_000_000_000
"""Where a run costs more operations, a few of the layers are run (see `cut_program`)."""
MAX_FLOPS = 150_000_000_000
"""All layers are not run, where a few do not stand for them, if that takes more."""
MAX_WEIGHT_ELEMENTS = 700_000_000
"""A weight of more elements, widened as one tensor, would not fit beside the rest."""
LENGTHS = (37, 20)
"""Tokens of the two sequences of a run; the second is the beginning of the first, so that one
whole run of the first says what both should give."""
CUTS = ((0, 29, 36, 37), (0, 9, 19, 20))
"""Where the sequences are cut into steps: chunks of a prompt, then one token."""
HEAVY_CUTS = ((0, 29, 37), (0, 19, 20))
"""The same for heavy programs: one sequence goes on with a chunk, the other with a token."""
_STEP_INPUTS = {"input_ids", "positions", "logits_index"}


def run_flops(program: Program) -> int:
    """Operations of one run of the program as it was captured."""
    return total_cost(program, {"T": LENGTHS[0], "R": 6, "B": 1}).flops


def not_runnable(program: Program) -> str | None:
    """Why no run can be made of a program; None where it can."""
    is_step = {value.name for value in program.inputs} == _STEP_INPUTS
    if not is_step or next(iter(program.named_outputs()), None) != LOGITS:
        return "the program is not a model's step"
    split = split_matrices(program)
    for node in split.nodes:
        for ref in node.weights() if get_op(node.op).kind is not Kind.GATHER else ():
            kind = split.weights[ref.name].type
            if kind.dtype.is_float and kind.num_elements() > MAX_WEIGHT_ELEMENTS:
                return f"{ref} takes {format_size(4 * kind.num_elements())} in float32"
    return None


@dataclass(slots=True)
class WholeRuns:
    """Compares runs with those of the first program; a lossy pass makes a new first one.

    Each run reads every weight; `pairs` spare later ones the quantising. `what` says in reports
    what it is that runs.
    """

    pairs: QuantizedPairs = field(default_factory=QuantizedPairs)
    what: str = "the whole model"
    first: Program | None = None
    _expected: Outputs | None = None
    _last: Program | None = None
    _lossy: str | None = None

    def start(self, program: Program) -> None:
        """Take the first program that is seen as the one to compare with."""
        if self.first is None:
            self.first, self._last = program, program

    def rebase(self, before: Program, after: Program, name: str) -> Distance | None:
        """How far the lossy pass `name` went; its result is what comes next is compared with.

        What it was given is compared first: afterwards there is nothing to compare it with. None
        for a program that no run can be made of.
        """
        import torch

        assert self.first is not None
        if after.resources or not_runnable(self.first) or not_runnable(after):
            self.check(f"before {name}", before)
            self.first, self._last, self._expected, self._lossy = after, after, None, name
            return None
        lengths, cuts = _lengths(before), self._cuts()
        every = tuple(range(lengths[0]))
        with _named(f"before {name}"):
            old = self._all_rows(before, every)
            if not _same_graph(before, self._last):
                given = self._all_rows(self.first, every)
                self._require(f"before {name}", given, old, "a whole prompt")
        with _named(name):
            new = self._all_rows(after, every)
        if not (new[0] < torch.inf).all() and (old[0] < torch.inf).all():
            raise PassError(f"{name} makes logits that are not finite ({self.what})")
        self.first, self._last, self._lossy = after, after, name
        rows = wanted_rows(lengths, cuts)
        self._expected = tuple(output[rows] for output in new)
        return distance(old[0], new[0], self.what)

    def check(self, phase: str, program: Program) -> str:
        """What was compared, in a few words; PassError where logits differ."""
        if self.first is None or _same_graph(program, self._last):
            return f"{phase}: nothing changed since the last comparison"
        given, wanted = (list(one.named_outputs()) for one in (program, self.first))
        if len(given) != len(wanted):
            raise PassError(
                f"after phase {phase} the program gives {', '.join(given)}, expected "
                f"{', '.join(wanted)}"
            )
        reason = not_runnable(self.first) or not_runnable(program)
        if self.first.resources:
            reason = "the program was lowered before"
        if reason is not None:
            return f"{phase}: not compared as a whole, {reason}"
        with _named(f"the program after {phase}"):
            text = self._compare(phase, program, _lengths(program), self._cuts())
        self._last = program
        return f"{phase}: {text}"

    def _cuts(self) -> Cuts:
        assert self.first is not None
        return HEAVY_CUTS if run_flops(self.first) > HEAVY_FLOPS else CUTS

    def _all_rows(self, program: Program, rows: tuple[int, ...]) -> Outputs:
        """The outputs at every position, in float64: their distance goes into the report, which
        must not depend on how a machine orders a sum."""
        return run_whole(program, self.pairs, len(rows), rows, wide="f64")

    def _compare(self, phase: str, program: Program, lengths: list[int], cuts: Cuts) -> str:
        import torch

        assert self.first is not None
        rows = wanted_rows(lengths, cuts)
        if self._expected is None:
            self._expected = run_whole(self.first, self.pairs, lengths[0], rows)
        if not program.resources:
            found = run_whole(program, self.pairs, lengths[0], rows)
            self._require(phase, self._expected, found, "a whole prompt")
            base = f" with the result of {self._lossy}" if self._lossy else ""
            return f"a run of {lengths[0]} tokens agrees{base}{self._where()}"
        places, found = run_paged(program, self.pairs, lengths, cuts)
        order = torch.tensor([rows.index(row) for row in places])
        expected = tuple(output[order] for output in self._expected)
        self._require(phase, expected, found, "paged steps")
        base = f" of the result of {self._lossy}" if self._lossy else ""
        steps = f"{len(cuts[0]) - 1} paged steps of 2 sequences"
        return f"{steps} agree with a whole run{base}{self._where()}"

    def _where(self) -> str:
        return "" if self.what == "the whole model" else f" ({self.what})"

    def _require(self, phase: str, expected: Outputs, actual: Outputs, what: str) -> None:
        assert self.first is not None
        names = [_SPOKEN.get(name, name) for name in self.first.named_outputs()]
        for name, wanted, given in zip(names, expected, actual, strict=True):
            found = difference(wanted, given)
            if found.error > TOLERANCE:
                raise PassError(
                    f"{name} of {what} after phase {phase} are off by {found.error:.3g} of their "
                    f"largest value, allowed {TOLERANCE:.3g}; worst in row {found.row} of "
                    f"{found.rows}{self._where()}"
                )


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Lets an error say which program does not run; those of the user's input say enough."""
    try:
        yield
    except (PassError, UsageError, CheckpointError):
        raise
    except InfcError as error:
        raise PassError(f"{what} does not run: {error}") from error


def _lengths(program: Program) -> list[int]:
    return [min(length, program.spec.max_context or length) for length in LENGTHS]


def _same_graph(program: Program, other: Program | None) -> bool:
    """Whether two programs differ in phase and plan at most."""
    if other is None:
        return False
    return replace(program, phase=other.phase, attrs=other.attrs) == other
