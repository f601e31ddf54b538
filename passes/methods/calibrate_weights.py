"""Chooses the codes of quantised matrices by what the model computes on a calibration text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final

from ...ir.errors import UsageError
from ...ir.machine import available_cpus
from ...ir.program import Attr, Program, Weight, WeightExpr
from ...ir.quantized_pairs import PARTS
from ...ir.schemes import AUTO
from ...ir.torch_threads import one_torch_thread
from ..base import Pass, PassContext, PassResult, finish
from ..near_miss import NearMiss
from .calibration import Calibration
from .gptq import Gptq

NEAREST: Final = "nearest"
GPTQ: Final = "gptq"
METHODS: Final = (AUTO, NEAREST, GPTQ)


@dataclass(frozen=True)
class CalibrateWeights(Pass):
    """`@w.codes = codes{scheme = "int4"}(w)` => `@w.codes = calibrated{key = "w.codes", ...}`.

    `correction` (0 to 1) is how far each matrix is moved towards the results of the source model,
    before it is rounded. `damping` is what is added to the diagonal of a Hessian, as a share of its
    mean: a sum over few tokens has small eigenvalues that other texts do not have. The method
    `auto` is gptq if there is a calibration text.

    Requires: unit-batch-squeezed. Ensures: nothing more (by default the method is nearest).
    Keeps: the format of every matrix; on the calibration text no product is further from that of
    the matrix that was moved than with codes that were rounded to nearest.
    Why: the error of one weight can make up for that of another, and of matrices before it: with
    4 bits, the predictions are three times as near.
    """

    method: str = NEAREST
    damping: float = 0.5
    correction: float = 0.5

    name: ClassVar[str] = "calibrate-weights"
    phase: ClassVar[str] = "quantize"
    contract: ClassVar[str] = "lossy"
    requires: ClassVar[frozenset[str]] = frozenset({"unit-batch-squeezed"})
    fits_weights: ClassVar[bool] = True

    @property
    def reads_text(self) -> bool:
        """Whether codes are chosen."""
        return self.method != NEAREST

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantise anew, layer by layer, every matrix of a scheme with a grid."""
        if self.method not in METHODS:
            known = ", ".join(METHODS)
            raise UsageError(f"unknown method {self.method}", where=self.name, hint=known)
        if not 0 < self.damping <= 1:
            raise UsageError(f"damping is {self.damping}, expected 0 to 1", where=self.name)
        if not 0 <= self.correction <= 1:
            raise UsageError(f"correction is {self.correction}, expected 0 to 1", where=self.name)
        if self.method == NEAREST or not _parts(program):
            return finish(program, program, 0)
        calibration = context.calibration
        if calibration is None and self.method == AUTO:
            return finish(program, program, 0)
        if calibration is None:
            raise UsageError(
                f"method {self.method} needs a calibration text",
                where=self.name,
                hint="set quantization.calibration in the recipe",
            )
        details: Mapping[str, Any] = {}
        misses: tuple[NearMiss, ...] = ()
        # The same passes run again over a few layers of the model: those have been made already.
        if not calibration.made and not calibration.is_added:
            with one_torch_thread(), ThreadPoolExecutor(available_cpus()) as pool:
                method = Gptq(
                    program, calibration, pool, self.damping, self.correction, context.log
                )
                misses = method.misses()
                if not method.has_work:
                    if self.method != AUTO and not _is_calibrated(program):
                        raise _nothing_to_do(self.name, self.method, misses)
                    if misses:
                        context.log(f"nothing is calibrated: {misses[0].reason}")
                    return finish(program, program, 0, misses)
                if self.method == AUTO:
                    quick = "quantization.method=nearest takes seconds, and is less accurate"
                    name = calibration.description.get("name", "a text")
                    context.log(f"calibrating on {calibration.tokens} tokens of {name} ({quick})")
                method.run()
            details, misses = method.details(), method.misses()
        return replace(self._result(program, calibration, misses), details=details)

    def _result(
        self, program: Program, calibration: Calibration, misses: tuple[NearMiss, ...]
    ) -> PassResult:
        weights = dict(program.weights)
        matches = 0
        for weight in _parts(program):
            key = calibration.key(program, weight.name)
            if key is not None:
                weights[weight.name] = replace(weight, expr=_made(key, weight))
                matches += weight.expr.op == "codes"
            elif calibration.is_added and weight.expr.op == "codes":
                reason = "rounded to nearest: calibration made nothing of it for the model's step"
                misses = (*misses, NearMiss(reason, f"@{weight.name}"))
        loaders = {**program.loaders, "calibrated": calibration.spill.read}
        after = replace(program, weights=weights, loaders=loaders)
        return finish(program, after, matches, misses)


def _is_calibrated(program: Program) -> bool:
    return any(weight.expr.op == "calibrated" for weight in program.weights.values())


def _nothing_to_do(where: str, method: str, misses: Sequence[NearMiss]) -> UsageError:
    """Calibration was asked for in words, so that rounding to nearest would be another thing."""
    reason = misses[0].reason if misses else "no quantized matrix has codes that it could choose"
    return UsageError(
        f"method {method} has nothing to calibrate: {reason}",
        where=where,
        hint="set quantization.method: nearest, or choose another scheme",
    )


def _parts(program: Program) -> list[Weight]:
    """The entries of the weight table that are parts of a quantised matrix."""
    return [weight for weight in program.weights.values() if weight.expr.op in PARTS]


def _made(key: str, weight: Weight) -> WeightExpr:
    shape = tuple(dim for dim in weight.type.shape if isinstance(dim, int))
    attrs: dict[str, Attr] = {"key": key, "dtype": weight.type.dtype.value, "shape": shape}
    return WeightExpr("calibrated", (), attrs)
