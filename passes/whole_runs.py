"""Whole runs of a program: a prompt at once before lowering, in paged steps after it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from ..ir.analyses import total_cost
from ..ir.errors import InfcError, PassError
from ..ir.interpret import Interpreter
from ..ir.ops.quantized import QUANTIZERS
from ..ir.paged_state import PagedState
from ..ir.program import Program
from ..ir.quantized_pairs import QuantizedPairs
from ..ir.weights import evaluate_weight
from .compare import difference
from .samples import SampleWeights

if TYPE_CHECKING:
    import torch

    Outputs = tuple[torch.Tensor, ...]

_OUTPUT_NAMES = ("logits", "hidden states")

TOLERANCE = 2e-4
"""Largest error of whole runs in float32: rounding in another order adds up over layers."""
MAX_FLOPS = 150_000_000_000
"""A run that costs more operations is not made; the report says so."""
HEAVY_FLOPS = 10_000_000_000
"""Runs that cost more are made once, after the last phase that changes the program."""

Cuts = tuple[tuple[int, ...], ...]
"""For each sequence, where its steps begin and end."""

LENGTHS = (37, 20)
"""Tokens of the two sequences of a run; the second is the beginning of the first, so that one
whole run of the first says what both should give."""
CUTS = ((0, 29, 36, 37), (0, 9, 19, 20))
"""Where the sequences are cut into steps: chunks of a prompt, then one token."""
HEAVY_CUTS = ((0, 29, 37), (0, 19, 20))
"""The same for heavy programs: one sequence goes on with a chunk, the other with a token."""


@dataclass(slots=True)
class WholeRuns:
    """Compares runs with those of the first program; a lossy pass makes a new first one.

    Each run reads every weight; `pairs` spare later ones the quantising.
    """

    pairs: QuantizedPairs = field(default_factory=QuantizedPairs)
    first: Program | None = None
    _expected: Outputs | None = None
    _last: Program | None = None
    _lossy: str | None = None

    def start(self, program: Program) -> None:
        """Take the first program that is seen as the one to compare with."""
        if self.first is None:
            self.first, self._last = program, program

    def rebase(self, before: Program, after: Program, name: str) -> str:
        """Compare with what the lossy pass `name` gave, from now on.

        What it was given is compared first; returns what was, in a few words, or nothing.
        """
        text = ""
        if not _same_graph(before, self._last):
            text = self.check(f"before {name}", before)
        self.first, self._last, self._expected = after, after, None
        self._lossy = name
        return text

    def check(self, phase: str, program: Program, *, final: bool = True) -> str:
        """What was compared, in a few words; PassError where logits differ.

        Unless the phase is the `final` one, a run that costs much is left to a later phase.
        """
        lossy, self._lossy = self._lossy, None
        if self.first is None or _same_graph(program, self._last):
            if lossy is not None:
                return f"{phase}: {lossy} is lossy, later phases are compared with its result"
            return f"{phase}: nothing changed since the last comparison"
        inputs = {value.name for value in program.inputs}
        if inputs != {"input_ids", "positions", "logits_index"}:
            return f"{phase}: not compared as a whole, the program is not a model's step"
        lengths = [min(length, program.spec.max_context or length) for length in LENGTHS]
        flops = total_cost(self.first, {"T": lengths[0], "R": 6, "B": 1}).flops
        heavy = flops > HEAVY_FLOPS
        if heavy and not (final or program.resources):
            return f"{phase}: whole runs ({flops / 1e9:.0f} GFLOP each) left to the last phase"
        if flops > MAX_FLOPS:
            return f"{phase}: not compared as a whole, a run takes {flops / 1e9:.0f} GFLOP"
        if self.first.resources:
            return f"{phase}: not compared as a whole, the program was lowered before"
        try:
            text = self._compare(phase, program, lengths, HEAVY_CUTS if heavy else CUTS)
        except PassError:
            raise
        except InfcError as error:
            raise PassError(f"the program after {phase} does not run: {error}") from error
        self._last = program
        return f"{phase}: {text}"

    def _compare(self, phase: str, program: Program, lengths: list[int], cuts: Cuts) -> str:
        import torch

        assert self.first is not None
        if self._expected is None:
            self._expected = _whole(self.first, self.pairs, lengths, cuts)
        if not program.resources:
            found = _whole(program, self.pairs, lengths, cuts)
            self._require(phase, self._expected, found, "a whole prompt")
            return f"a run of {lengths[0]} tokens agrees"
        rows = _wanted(lengths, cuts)
        places, found = _paged(program, self.pairs, lengths, cuts)
        order = torch.tensor([rows.index(row) for row in places])
        expected = tuple(output[order] for output in self._expected)
        self._require(phase, expected, found, "paged steps")
        return f"{len(cuts[0]) - 1} paged steps of 2 sequences agree with a whole run"

    def _require(self, phase: str, expected: Outputs, actual: Outputs, what: str) -> None:
        for name, wanted, given in zip(_OUTPUT_NAMES, expected, actual, strict=False):
            found = difference(wanted, given)
            if found.error > TOLERANCE:
                raise PassError(
                    f"{name} of {what} after phase {phase} are off by {found.error:.3g} of their "
                    f"largest value, allowed {TOLERANCE:.3g}; worst in row {found.row} of "
                    f"{found.rows}"
                )


def _same_graph(program: Program, other: Program | None) -> bool:
    """Whether two programs differ in phase and plan at most."""
    if other is None:
        return False
    return replace(program, phase=other.phase, attrs=other.attrs) == other


def _tokens(program: Program, length: int) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(17)
    return torch.randint(0, max(program.spec.vocab_size, 2), (length,), generator=generator)


def _wanted(lengths: list[int], cuts: Cuts) -> list[int]:
    """The positions at which a step of either sequence ends, ascending."""
    ends = {
        min(last, length) - 1
        for places, length in zip(cuts, lengths, strict=True)
        for first, last in pairwise(places)
        if min(last, length) > first
    }
    return sorted(ends)


def _interpreter(
    program: Program, pairs: QuantizedPairs, state: PagedState | None = None
) -> Interpreter:
    """In float32, float64 over codes; weights one at a time, random without a checkpoint."""
    # Codes step: float32 sums in another order would make other codes now and then, and hide less.
    wide = "f64" if any(node.op in QUANTIZERS for node in program.nodes) else "f32"
    if "checkpoint" in program.loaders:

        def real(name: str) -> torch.Tensor:
            return evaluate_weight(program, name, check_finite=False, pairs=pairs)

        return Interpreter(program, real, state, dtype_override=wide)
    sample = SampleWeights((program,))
    return Interpreter(program, lambda name: sample.get(program, name), state, dtype_override=wide)


def _whole(program: Program, pairs: QuantizedPairs, lengths: list[int], cuts: Cuts) -> Outputs:
    """The outputs at the wanted positions of the longer sequence, run at once."""
    import torch

    inputs = {
        "input_ids": _tokens(program, lengths[0]),
        "positions": torch.arange(lengths[0]),
        "logits_index": torch.tensor(_wanted(lengths, cuts)),
    }
    return tuple(_interpreter(program, pairs).run(inputs))


def _paged(
    program: Program, pairs: QuantizedPairs, lengths: list[int], cuts: Cuts
) -> tuple[list[int], Outputs]:
    """Positions at the end of each step, both sequences in the same steps, and the outputs."""
    import torch

    state = _pages(program, lengths)
    interpreter = _interpreter(program, pairs, state)
    places: list[int] = []
    results: list[Outputs] = []
    tokens = _tokens(program, lengths[0])
    for step in range(len(cuts[0]) - 1):
        spans = [
            (i, min(cuts[i][step], length), min(cuts[i][step + 1], length))
            for i, length in enumerate(lengths)
        ]
        spans = [span for span in spans if span[2] > span[1]]
        if not spans:
            continue
        counts = [last - first for _, first, last in spans]
        starts = torch.tensor([0, *counts]).cumsum(0)
        positions = torch.cat([torch.arange(first, last) for _, first, last in spans])
        tables = {
            group.name: torch.stack([_table(group.block_size, i, lengths) for i, _, _ in spans])
            for group in program.resources
        }
        contexts = torch.tensor([last for _, _, last in spans])
        state.set_step(positions, starts, contexts, tables)
        ids = torch.cat([tokens[first:last] for _, first, last in spans])
        inputs = {"input_ids": ids, "positions": positions, "logits_index": starts[1:] - 1}
        results.append(tuple(interpreter.run(inputs)))
        places.extend(last - 1 for _, _, last in spans)
    return places, tuple(torch.cat(parts) for parts in zip(*results, strict=True))


def _blocks_each(block_size: int, lengths: list[int]) -> int:
    return -(-max(lengths) // block_size)


def _pages(program: Program, lengths: list[int]) -> PagedState:
    """Storage for two sequences beside the null block, poisoned where nothing is written."""
    smallest = min(group.block_size for group in program.resources)
    state = PagedState.allocate(
        program.resources, 1 + 2 * _blocks_each(smallest, lengths), dtype="f64"
    )
    for storage in (*state.keys.values(), *state.values.values()):
        storage.fill_(float("nan"))
    return state


def _table(block_size: int, sequence: int, lengths: list[int]) -> torch.Tensor:
    """Blocks of a sequence, in no order that a program could rely on."""
    import torch

    count = _blocks_each(block_size, lengths)
    return torch.arange(1 + sequence, 1 + 2 * count, 2).flip(0)
