"""Error feedback over a whole model, layer by layer: on what the quantised ones before give."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...ir.errors import PassError
from ...ir.interpret import describe
from ...ir.program import Program, Value
from ...ir.quantized_pairs import PARTS
from ...ir.schemes import get_scheme
from ...ir.weights import evaluate_weight
from ..near_miss import NearMiss
from .calibration import Calibration, figure
from .correction import HELD_OUT, Correction, Drift, correct, reduces_error
from .expert_feedback import RoundedExpert, hidden_rows, round_expert, routed
from .feedback import ROWS, Factor, Rounded, factorize, feed_back
from .grids import GRIDS, BlockGrid
from .hessians import hessian
from .layer_runs import STEP_INPUTS, LayerRuns
from .quantized_matrices import PlainProgram, QuantizedMatrix, plain_program

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Place:
    """A matrix, the place of the node that reads it first, and its shape `[N, K]`.

    `N` are the rows of all experts, if it has some.
    """

    index: int
    matrix: QuantizedMatrix
    shape: tuple[int, int]

    @property
    def work(self) -> int:
        """A measure of the time that it takes: its elements, as each meets every token."""
        return self.shape[0] * self.shape[1]


@dataclass(slots=True)
class Gptq:
    """Makes codes for every matrix of `program`; the tensors go to `calibration.spill`.

    True-sequential: within a layer, the inputs of each product come from those before it as they
    were quantised (queries, keys and values; output; gate and up; down). Products of one input
    share their Hessian.
    """

    program: Program
    calibration: Calibration
    pool: Executor
    damping: float
    correction: float
    log: Callable[[str], None]
    plain: PlainProgram = field(init=False)
    records: list[dict[str, Any]] = field(default_factory=list, init=False)
    unfed: list[NearMiss] = field(default_factory=list, init=False)
    _current: dict[str, torch.Tensor] = field(default_factory=dict, init=False)
    _done_work: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.plain = plain_program(self.program)

    def run(self) -> None:
        """PassError names the product whose inputs are not finite, or that has no factor."""
        places = self._places()
        windows = self.calibration.windows
        if not windows or not {v.name for v in self.program.inputs} <= STEP_INPUTS:
            what = "no calibration tokens" if not windows else "the program is not a model's step"
            raise PassError(what)
        runs = LayerRuns(self.plain.program, windows, self._weight, self.pool)
        source = None
        if self.correction:
            source = LayerRuns(self.plain.program, windows, self._source_weight, self.pool)
        done: set[str] = set()
        for place in places:
            if place.matrix.name in done:
                continue
            self._tell(places, place.index)
            runs.run_to(place.index)
            self._current.clear()
            if source is not None:
                source.run_to(place.index)
            if place.matrix.input is None:
                self._quantize_experts(place, runs)
                done.add(place.matrix.name)
                continue
            ready = [one for one in places if one.matrix.name not in done and _is_ready(one, runs)]
            for group in _by_input(ready):
                self._quantize(group, runs, source, is_last=ready[-1] is places[-1])
                done.update(one.matrix.name for one in group)
        if places:
            self._tell(places, places[-1].index)

    @property
    def has_work(self) -> bool:
        """Whether there is any matrix to make codes for."""
        return bool(self._places())

    def _places(self) -> list[_Place]:
        """The matrices that can be calibrated, in program order, each where it is read first."""
        found: dict[str, _Place] = {}
        for index, node in enumerate(self.plain.program.nodes):
            for ref in node.weights():
                matrix = self.plain.matrices.get(ref.name)
                if matrix is not None and _reason(matrix) is None:
                    *lead, depth = self.plain.program.weights[ref.name].type.shape
                    rows = math.prod(size for size in lead if isinstance(size, int))
                    assert isinstance(depth, int)
                    found.setdefault(ref.name, _Place(index, matrix, (rows, depth)))
        return list(found.values())

    def misses(self) -> tuple[NearMiss, ...]:
        """The matrices that stay as they were, and why."""
        reasons = ((m.parts["codes"], _reason(m)) for m in self.plain.matrices.values())
        left = [NearMiss(reason, f"@{name}") for name, reason in reasons if reason is not None]
        return (*left, *self.unfed)

    def details(self) -> dict[str, Any]:
        """For the report: the text, and the relative squared error of every product on it."""
        return {
            "calibration": {
                "tokens": self.calibration.tokens,
                **self.calibration.description,
                "windows": len(self.calibration.windows),
                "damping": self.damping,
                "correction": self.correction,
            },
            "errors": self.records,
        }

    def _quantize(
        self, group: Sequence[_Place], runs: LayerRuns, source: LayerRuns | None, *, is_last: bool
    ) -> None:
        """All products of one input."""
        x = group[0].matrix.input
        assert x is not None
        matrices = [evaluate_weight(self.plain.program, one.matrix.name) for one in group]
        inputs = runs.get(x)
        drift = None if source is None else Drift(source.get(x), inputs)
        correction, factor = self._correction(matrices, drift, inputs, group[0].index)
        if factor.damping != self.damping:
            node = self.plain.program.nodes[group[0].index]
            self.log(f"{describe(node)}: damping raised to {factor.damping:g}")
        for index, (place, matrix) in enumerate(zip(group, matrices, strict=True)):

            def moved(
                first: int, index: int = index, matrix: torch.Tensor = matrix
            ) -> torch.Tensor:
                rows = matrix[first : first + ROWS]
                return rows if correction is None else correction.of(index, rows, first)

            self._make(place, moved, factor, keep=not is_last)
            self._done_work += place.work

    def _correction(
        self,
        matrices: Sequence[torch.Tensor],
        drift: Drift | None,
        inputs: Sequence[torch.Tensor],
        place: int,
    ) -> tuple[Correction | None, Factor]:
        """How matrices are moved, if that helps in windows that it was not found on; and the factor
        of the Hessian of all windows. `place` is that of the node that reads the inputs."""
        if drift is None or drift.is_zero:
            return None, self._factor(hessian(inputs, self.pool), place)
        fitted, held = drift.parts(HELD_OUT)
        moments = hessian(fitted.quantized, self.pool)
        if not held.source:
            found = correct(matrices, fitted, moments, self.correction, self.pool)
            return found, self._factor(moments, place)
        share = held.num_tokens / (held.num_tokens + fitted.num_tokens)
        whole = hessian(held.quantized, self.pool).mul_(share).add_(moments, alpha=1 - share)
        # Both have a factorization of one thread, which takes seconds for many columns.
        factor = self.pool.submit(self._factor, whole, place)
        found = correct(matrices, fitted, moments, self.correction, self.pool)
        del moments
        if found is not None and not reduces_error(matrices, found, held, self.pool):
            found = None
        return found, factor.result()

    def _factor(self, moments: torch.Tensor, place: int) -> Factor:
        """The factor of a Hessian; PassError names the node that reads the inputs."""
        try:
            return factorize(moments, self.damping)
        except PassError as error:
            node = self.plain.program.nodes[place]
            raise PassError(error.message, where=describe(node)) from error

    def _quantize_experts(self, place: _Place, runs: LayerRuns) -> None:
        """One of the two matrices of a mixture; the second on what the first one gives by now."""
        import torch

        node, matrix = self.plain.program.nodes[place.index], place.matrix
        x, slots = (runs.get(one) for one in node.inputs[:2] if isinstance(one, Value))
        into, *biases = (ref.name for ref in node.weights() if ref.name != matrix.name)
        is_second = str(node.inputs[3]) == f"@{into}"
        first = self._weight(into) if is_second else None
        bias = self._weight(biases[0]) if is_second and biases else None
        nearest = get_scheme(matrix.scheme).quantize
        nearest = self.calibration.pairs.quantizers.get(matrix.scheme, nearest)
        whole = evaluate_weight(self.plain.program, matrix.name)

        def factor(rows: torch.Tensor) -> Factor:
            try:
                return factorize(hessian([rows], self.pool), self.damping)
            except PassError as error:
                raise PassError(error.message, where=describe(node)) from error

        def fed(one: torch.Tensor, factor: Factor) -> list[Rounded]:
            return self._rounded(
                matrix, lambda start: one[start : start + ROWS], len(one), factor, keep=True
            )

        made = []
        for expert, one in enumerate(whole):
            rows = routed(x, slots, expert)
            if first is not None:
                own = None if bias is None else bias[expert]
                rows = hidden_rows(node, rows, first[expert], own)
            made.append(round_expert(one, rows, matrix.scheme, factor, fed, nearest))
        codes = torch.stack([one.parts["codes"] for one in made])
        self._check(matrix, codes)
        self._store(matrix, {part: torch.stack([e.parts[part] for e in made]) for part in PARTS})
        used = [one for one in made if one.is_fed]
        if len(used) < len(made):
            reason = (
                f"{len(made) - len(used)} of {len(made)} experts are rounded to nearest: too few"
                " tokens reach them for feedback to lower their error"
            )
            self.unfed.append(NearMiss(reason, f"@{matrix.parts['codes']}"))
        self._record(matrix, used, {"experts": len(made), "nearest_experts": len(made) - len(used)})
        self._done_work += place.work

    def _make(
        self, place: _Place, source: Callable[[int], torch.Tensor], factor: Factor, *, keep: bool
    ) -> None:
        """The codes of one matrix, some rows at a time: `source` gives those from a row on."""
        import torch

        matrix = place.matrix
        made = self._rounded(matrix, source, place.shape[0], factor, keep=keep)
        self._check(matrix, torch.cat([one.parts["codes"] for one in made]))
        self._store(matrix, {part: torch.cat([one.parts[part] for one in made]) for part in PARTS})
        if keep:
            self._current[matrix.name] = torch.cat([one.values for one in made])
        more: dict[str, Any] = {}
        if factor.damping != self.damping:
            more["damping"] = factor.damping
        if factor.dead:
            more["unused_columns"] = factor.dead
        self._record(matrix, made, more)

    def _rounded(
        self,
        matrix: QuantizedMatrix,
        source: Callable[[int], torch.Tensor],
        num_rows: int,
        factor: Factor,
        *,
        keep: bool,
    ) -> list[Rounded]:
        """Rows of a matrix, a part at a time; what they stand for too if `keep`."""
        import torch

        grid = GRIDS[matrix.scheme]
        compiled = self.calibration.compiled.get(matrix.scheme)

        def rows(first: int) -> Rounded:
            part = source(first)
            rounded = compiled.feed_back(part, factor) if compiled is not None else None
            rounded = rounded or feed_back(part, factor, grid)
            stored = decoded(matrix.scheme, rounded.parts, part.shape[-1])
            if not torch.equal(stored, rounded.values):
                self._check(matrix, rounded.parts["codes"])
                where = f"@{matrix.name}"
                raise PassError("the codes do not stand for the rounded values", where=where)
            return rounded if keep else rounded.without_values()

        return list(self.pool.map(rows, range(0, num_rows, ROWS)))

    def _check(self, matrix: QuantizedMatrix, codes: torch.Tensor) -> None:
        """UsageError where the format has no scales for the magnitude of the matrix."""
        grid = GRIDS[matrix.scheme]
        if isinstance(grid, BlockGrid):
            whole = evaluate_weight(self.plain.program, matrix.name)
            grid.rounding.check_scales(whole, codes, where=f"@{matrix.name}")

    def _store(self, matrix: QuantizedMatrix, parts: Mapping[str, torch.Tensor]) -> None:
        for part, entry in matrix.parts.items():
            self.calibration.keep(self.program, entry, parts[part])

    def _record(
        self, matrix: QuantizedMatrix, made: Sequence[Rounded | RoundedExpert], more: dict[str, Any]
    ) -> None:
        size = sum(one.size for one in made) or 1.0
        record: dict[str, Any] = {
            "matrix": matrix.parts["codes"].removesuffix(".codes"),
            "nearest": figure(sum(one.nearest for one in made) / size),
            "gptq": figure(sum(one.error for one in made) / size),
        }
        self.records.append(record | more)

    def _source_weight(self, name: str) -> torch.Tensor:
        """A weight of the plain program, as it is in the source model where that is known."""
        matrix = self.plain.matrices.get(name)
        if matrix is None or matrix.source is None:
            return self._weight(name)
        return evaluate_weight(self.plain.program, name, check_finite=False)

    def _weight(self, name: str) -> torch.Tensor:
        """A weight of the plain program, as it is quantised by now."""
        if name in self._current:
            return self._current[name]
        matrix = self.plain.matrices.get(name)
        if matrix is None:
            pairs = self.calibration.pairs
            return evaluate_weight(self.plain.program, name, check_finite=False, pairs=pairs)
        parts = {part: self._part(entry) for part, entry in matrix.parts.items()}
        depth = self.plain.program.weights[name].type.shape[-1]
        assert isinstance(depth, int)
        return decoded(matrix.scheme, parts, depth)

    def _part(self, entry: str) -> torch.Tensor:
        key = self.calibration.key(self.program, entry)
        if key is None:
            return evaluate_weight(self.program, entry, pairs=self.calibration.pairs)
        return self.calibration.spill.read(key)

    def _tell(self, places: Sequence[_Place], index: int) -> None:
        total = sum(place.work for place in places)
        node = self.plain.program.nodes[index]
        where = "head" if node.layer is None else f"layer {node.layer}"
        detail = f"calibrating {where} on {self.calibration.tokens} tokens"
        self.calibration.advance(self._done_work, total, detail)


def decoded(scheme: str, parts: Mapping[str, torch.Tensor], depth: int) -> torch.Tensor:
    """What the parts of a matrix `[.., N, depth]` stand for, in float32."""
    return get_scheme(scheme).weight.decode(parts["codes"], parts["scales"], depth)


def _reason(matrix: QuantizedMatrix) -> str | None:
    """Why a matrix is not calibrated; None where it is."""
    if matrix.is_adopted:
        return "its codes are those of the file"
    if matrix.source is None:
        return "its codes are not made of one matrix"
    if matrix.is_table:
        return "rows are looked up in it as well, and feedback would move them further away"
    if matrix.scheme not in GRIDS:
        return f"rounded to nearest: error feedback has no grid for the scheme {matrix.scheme}"
    return None


def _is_ready(place: _Place, runs: LayerRuns) -> bool:
    source = place.matrix.input
    return isinstance(source, Value) and runs.has(source)


def _by_input(places: Sequence[_Place]) -> list[list[_Place]]:
    groups: dict[str, list[_Place]] = {}
    for place in places:
        assert place.matrix.input is not None
        groups.setdefault(place.matrix.input.name, []).append(place)
    return list(groups.values())
