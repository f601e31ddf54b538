"""Whole runs of a program: a prompt at once before lowering, in paged steps after it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from ..ir.analyses import total_cost
from ..ir.errors import InfcError, PassError
from ..ir.interpret import Interpreter
from ..ir.paged_state import PagedState
from ..ir.program import Program
from ..ir.weights import evaluate_weight
from .compare import difference
from .samples import SampleWeights

if TYPE_CHECKING:
    import torch

TOLERANCE = 2e-4
"""Largest error of whole runs in float32: rounding in another order adds up over layers."""
MAX_FLOPS = 150_000_000_000
"""A run that costs more operations is not made; the report says so."""

LENGTHS = (38, 20)
"""Tokens of the two sequences of a run."""
CUTS = ((0, 29, 36, 37, 38), (0, 9, 19, 20, 20))
"""Where the sequences are cut into steps: chunks of a prompt, then one token at a time."""


@dataclass(slots=True)
class WholeRuns:
    """Compares runs with those of the first program; a lossy pass makes a new first one."""

    first: Program | None = None
    _expected: dict[int, torch.Tensor] = field(default_factory=dict)
    _last: Program | None = None

    def start(self, program: Program) -> None:
        """Take the first program that is seen as the one to compare with."""
        if self.first is None:
            self.rebase(program)

    def rebase(self, program: Program) -> None:
        """Compare with this program from now on."""
        self.first, self._last = program, program
        self._expected = {}

    def check(self, phase: str, program: Program) -> str:
        """What was compared, in a few words; PassError where logits differ."""
        if self.first is None or _same_graph(program, self._last):
            return f"{phase}: nothing changed since the last comparison"
        inputs = {value.name for value in program.inputs}
        if inputs != {"input_ids", "positions", "logits_index"}:
            return f"{phase}: not compared as a whole, the program is not a model's step"
        lengths = [min(length, program.spec.max_context or length) for length in LENGTHS]
        flops = total_cost(self.first, {"T": sum(lengths), "R": 4, "B": 1}).flops
        if flops > MAX_FLOPS:
            return f"{phase}: not compared as a whole, a run takes {flops / 1e9:.0f} GFLOP"
        try:
            text = self._compare(phase, program, lengths)
        except PassError:
            raise
        except InfcError as error:
            raise PassError(f"the program after {phase} does not run: {error}") from error
        self._last = program
        return f"{phase}: {text}"

    def _compare(self, phase: str, program: Program, lengths: list[int]) -> str:
        if not program.resources:
            actual = _whole(program, lengths[0])
            self._require(phase, self._want(0, lengths[0]), actual, "a whole prompt")
            return f"a run of {lengths[0]} tokens agrees"
        import torch

        found: list[list[torch.Tensor]] = [[], []]
        for sequence, row in _paged(program, lengths):
            found[sequence].append(row)
        for sequence, rows in enumerate(found):
            expected = self._want(sequence, lengths[sequence])
            self._require(phase, expected, torch.stack(rows), f"paged sequence {sequence}")
        return f"{len(CUTS[0]) - 1} paged steps of 2 sequences agree with whole runs"

    def _want(self, sequence: int, length: int) -> torch.Tensor:
        if sequence not in self._expected:
            assert self.first is not None
            self._expected[sequence] = _whole(self.first, length, sequence)
        return self._expected[sequence]

    def _require(self, phase: str, expected: torch.Tensor, actual: torch.Tensor, what: str) -> None:
        found = difference(expected, actual)
        if found.error > TOLERANCE:
            raise PassError(
                f"logits of {what} after phase {phase} are off by {found.error:.3g} of their "
                f"largest value, allowed {TOLERANCE:.3g}; worst in row {found.row} of {found.rows}"
            )


def _same_graph(program: Program, other: Program | None) -> bool:
    """Whether two programs differ in phase and plan at most."""
    if other is None:
        return False
    return replace(program, phase=other.phase, attrs=other.attrs) == other


def _tokens(program: Program, length: int, sequence: int) -> torch.Tensor:
    import torch

    generator = torch.Generator().manual_seed(17 + sequence)
    return torch.randint(0, max(program.spec.vocab_size, 2), (length,), generator=generator)


def _ends(length: int, sequence: int) -> list[int]:
    """The last row of each step of a sequence, where a step has any."""
    cuts = [min(cut, length) for cut in CUTS[sequence]]
    return [last - 1 for first, last in pairwise(cuts) if last > first]


def _interpreter(program: Program, state: PagedState | None = None) -> Interpreter:
    """In float32; weights are made one at a time, random where there is no checkpoint."""
    if "checkpoint" in program.loaders:

        def real(name: str) -> torch.Tensor:
            return evaluate_weight(program, name, check_finite=False)

        return Interpreter(program, real, state, dtype_override="f32")
    sample = SampleWeights((program,))
    return Interpreter(program, lambda name: sample.get(program, name), state, dtype_override="f32")


def _whole(program: Program, length: int, sequence: int = 0) -> torch.Tensor:
    """Logits at the end of each step, from the whole sequence at once."""
    import torch

    inputs = {
        "input_ids": _tokens(program, length, sequence),
        "positions": torch.arange(length),
        "logits_index": torch.tensor(_ends(length, sequence)),
    }
    (logits,) = _interpreter(program).run(inputs)
    return logits


def _paged(program: Program, lengths: list[int]) -> list[tuple[int, torch.Tensor]]:
    """(sequence, logits) at the end of each step, both sequences in the same steps."""
    import torch

    state = _pages(program, lengths)
    interpreter = _interpreter(program, state)
    results: list[tuple[int, torch.Tensor]] = []
    tokens = [_tokens(program, length, i) for i, length in enumerate(lengths)]
    for step in range(len(CUTS[0]) - 1):
        spans = [
            (i, min(CUTS[i][step], length), min(CUTS[i][step + 1], length))
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
        ids = torch.cat([tokens[i][first:last] for i, first, last in spans])
        inputs = {"input_ids": ids, "positions": positions, "logits_index": starts[1:] - 1}
        (logits,) = interpreter.run(inputs)
        results.extend((i, logits[row]) for row, (i, _, _) in enumerate(spans))
    return results


def _blocks_each(block_size: int, lengths: list[int]) -> int:
    return -(-max(lengths) // block_size)


def _pages(program: Program, lengths: list[int]) -> PagedState:
    """Storage for two sequences beside the null block, poisoned where nothing is written."""
    smallest = min(group.block_size for group in program.resources)
    state = PagedState.allocate(
        program.resources, 1 + 2 * _blocks_each(smallest, lengths), dtype="f32"
    )
    for storage in (*state.keys.values(), *state.values.values()):
        storage.fill_(float("nan"))
    return state


def _table(block_size: int, sequence: int, lengths: list[int]) -> torch.Tensor:
    """Blocks of a sequence, in no order that a program could rely on."""
    import torch

    count = _blocks_each(block_size, lengths)
    return torch.arange(1 + sequence, 1 + 2 * count, 2).flip(0)
