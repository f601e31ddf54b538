"""Proves passes harmless: changed regions on random data, whole runs after each phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ..ir.analyses import total_cost
from ..ir.errors import InfcError, PassError
from ..ir.interpret import Interpreter, describe
from ..ir.program import Program, Value
from ..ir.quantized_pairs import QuantizedPairs
from ..ir.sizes import format_count
from ..ir.types import evaluate_dim
from .base import Pass, PassContext
from .compare import Distance, difference
from .cut_runs import CutReport, check_cut
from .regions import Region, Side, find_regions, signature
from .samples import SampleWeights, bindings_of, sample_inputs
from .whole_runs import HEAVY_FLOPS, WholeRuns, not_runnable, run_flops

if TYPE_CHECKING:
    import torch

TOLERANCES = {"exact": 5e-6, "reassociates": 1e-4}
"""Largest error in float32, relative to the largest magnitude of a row."""
MAX_REGION_ELEMENTS = 400_000_000
"""A region that reads more weight elements than this is left to the whole runs."""
MAX_REGION_FLOPS = 200_000_000_000


@dataclass(frozen=True, slots=True)
class Checked:
    """What of a pass was checked, in a few words; of a lossy one also how far it went."""

    text: str
    distance: Distance | None = None


class Verifier:
    """Remembers what was checked; one for each run of a pipeline."""

    def __init__(self, pairs: QuantizedPairs | None = None) -> None:
        self.pairs = pairs or QuantizedPairs()
        self.whole = WholeRuns(self.pairs)
        self.first: Program | None = None
        self.is_heavy = False
        """Whether whole runs are left to `check_cut`, since one of all layers takes too long."""

    def start(self, program: Program) -> None:
        """Take the first program that is seen as the one that whole runs are compared with."""
        if self.first is None:
            self.first = program
            self.whole.start(program)
            runs = not program.resources and not_runnable(program) is None
            self.is_heavy = runs and run_flops(program) > HEAVY_FLOPS

    def check_pass(self, one: Pass, before: Program, after: Program) -> Checked:
        """PassError unless `after` computes what `before` does, within the pass's contract.

        Every distinct region that the pass changed runs in float32 on random inputs.
        """
        self.start(before)
        if one.fits_weights:
            return self._fitted(one, before, after)
        checked = _Checked()
        is_lossy = one.contract == "lossy"
        quantizers = self.whole.pairs.quantizers
        weights = SampleWeights((before, after), quantizers, has_factors=not is_lossy)
        for region in find_regions(before, after):
            checked.total += 1
            if region.has_effects:
                checked.stateful += 1
                continue
            key = signature(region)
            if key in checked.seen:
                continue
            checked.seen.add(key)
            if _too_large(region):
                checked.large += 1
                continue
            _check_region(one, region, weights)
        if not is_lossy or self.is_heavy:
            return Checked(checked.text())
        # What came before it has its whole run first: afterwards there is nothing to compare with.
        found = self.whole.rebase(before, after, one.name)
        return Checked(checked.text(), found)

    def _fitted(self, one: Pass, before: Program, after: Program) -> Checked:
        """The same graph, weights apart; random inputs and weights would say nothing of these."""
        if after.nodes != before.nodes:
            raise PassError("changes nodes, though it says that it fits weights alone")
        found = None if self.is_heavy else self.whole.rebase(before, after, one.name)
        return Checked("weights fitted to inputs, compared in whole runs", found)

    def check_phase(self, phase: str, program: Program) -> str | None:
        """What whole runs were compared; PassError unless they agree with those of the first.

        None where that is left to `check_cut`.
        """
        return None if self.is_heavy else self.whole.check(phase, program)

    def check_cut(self, final: Program, passes: Sequence[Pass], context: PassContext) -> CutReport:
        """Whole runs of a few layers of a heavy program; see `cut_runs`."""
        if self.first is None or not self.is_heavy:
            return CutReport([])
        return check_cut(self.first, final, passes, context, self.pairs)


@dataclass(slots=True)
class _Checked:
    """Counts of one pass's verification."""

    total: int = 0
    stateful: int = 0
    large: int = 0
    seen: set[str] = field(default_factory=set)

    def text(self) -> str:
        run = len(self.seen) - self.large
        words = [f"{self.total} regions, {run} distinct ones run"]
        if self.stateful:
            words.append(f"{self.stateful} with paged state left to the paged run")
        if self.large:
            words.append(f"{self.large} too large left to the whole run")
        return "; ".join(words)


def _too_large(region: Region) -> bool:
    for side in (region.before, region.after):
        refs = {ref.name for node in side.nodes for ref in node.weights()}
        elements = sum(side.program.weights[name].type.num_elements() for name in refs)
        cost = total_cost(_as_program(side), bindings_of(side.program))
        if elements > MAX_REGION_ELEMENTS or cost.flops > MAX_REGION_FLOPS:
            return True
    return False


def _as_program(side: Side) -> Program:
    """A region's side as a program of its own."""
    return replace(
        side.program,
        inputs=side.inputs,
        nodes=side.nodes,
        outputs=(side.output,),
        output_names=(),
        resources=(),
    )


def _check_region(one: Pass, region: Region, weights: SampleWeights) -> None:
    reads_positions = any(value.name == "positions" for value in region.before.inputs)
    for spread in (False, True) if reads_positions else (False,):
        inputs = sample_inputs(region.before.program, region.before.inputs, spread=spread)
        expected = _run(region.before, inputs, weights)
        try:
            actual = _run(region.after, inputs, weights)
        except InfcError as error:
            raise PassError(f"its result does not run: {error}", where=_place(region)) from error
        is_lossy = one.contract == "lossy"
        allowed = one.allowed_error if is_lossy else TOLERANCES[one.contract]
        found = difference(expected, actual.reshape(expected.shape), like_others=is_lossy)
        if found.error > allowed:
            where = f"row {found.row} of {found.rows}"
            if reads_positions:
                where += f" (position {int(inputs['positions'].reshape(-1)[found.row])})"
            raise PassError(
                f"breaks its contract {one.contract!r}: {_place(region)} is off by "
                f"{found.error:.3g} of its row's largest value, allowed {allowed:.3g}; "
                f"worst in {where}, {format_count(found.bad_rows, 'wrong row')}"
            )


def _place(region: Region) -> str:
    """The node whose result is checked, as it was and as it is."""
    names = {value.name for value in (region.before.output, region.after.output)}
    texts = [
        describe(node)
        for side in (region.before, region.after)
        for node in side.nodes
        if any(value.name in names for value in node.outputs)
    ]
    return " => ".join(dict.fromkeys(texts)) or f"{region.before.output}"


def _run(side: Side, inputs: dict[str, torch.Tensor], weights: SampleWeights) -> torch.Tensor:
    bindings = bindings_of(side.program)
    given = {
        value.name: inputs[value.name].reshape(_sizes(value, bindings)) for value in side.inputs
    }
    program = _as_program(side)

    def source(name: str) -> torch.Tensor:
        return weights.get(side.program, name)

    (result,) = Interpreter(program, source, dtype_override="f32").run(given, sizes=bindings)
    return result


def _sizes(value: Value, bindings: dict[str, int]) -> list[int]:
    return [evaluate_dim(dim, bindings) for dim in value.type.shape]
