"""What steps of a program take and give beside what all do: arrays by name, checked."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ...ir.errors import CapacityError, InfcError
from ...ir.manifest import CompiledProgram
from ...ir.shapes import bind_shape
from ...ir.types import DType, TensorType, evaluate_dim
from ..scheduling.step import Float32Array, Step

_DTYPES = {DType.F32: np.dtype(np.float32), DType.I32: np.dtype(np.int32)}


class FurtherArrays:
    """The further inputs and outputs of a program, and the symbols in their shapes.

    All are in the order of their sorted names.
    """

    def __init__(self, program: CompiledProgram) -> None:
        self.inputs = program.further_inputs
        self.outputs = program.further_outputs
        self._limits = {
            **program.limits.sizes,
            "T": program.limits.step_tokens,
            "R": program.limits.logit_rows,
        }
        self.symbols = tuple(sorted(program.limits.sizes))
        self.any = bool(self.inputs or self.outputs)

    def sizes(self, step: Step) -> dict[str, int]:
        """The size of each symbol in a step, T and R included.

        InfcError for an array that is missing, unknown or of another type, CapacityError beyond
        what was compiled in.
        """
        sizes = {"T": step.num_tokens, "R": len(step.logits_index)}
        if step.inputs.keys() != self.inputs.keys():
            wanted = ", ".join(self.inputs) or "none"
            given = ", ".join(sorted(step.inputs)) or "none"
            raise InfcError(
                f"the program takes other inputs than the step has: {wanted}, not {given}"
            )
        for name, kind in self.inputs.items():
            array = step.inputs[name]
            problem = bind_shape(kind, array.shape, sizes)
            if problem is None and array.dtype != _DTYPES[kind.dtype]:
                problem = f"is {array.dtype}, declared {kind}"
            if problem is None and not array.flags.c_contiguous:
                problem = "is not contiguous"
            if problem is not None:
                raise InfcError(f"the input {name} {problem}")
        for symbol, size in sizes.items():
            if size > self._limits[symbol]:
                raise CapacityError(
                    f"the step has {symbol} = {size}, and was compiled for {self._limits[symbol]}"
                )
        return sizes

    def empty_outputs(self, sizes: Mapping[str, int]) -> dict[str, Float32Array]:
        """An array of float32 for each further output, to be filled."""
        return {
            name: np.empty(shape_of(kind, sizes), np.float32) for name, kind in self.outputs.items()
        }


def shape_of(kind: TensorType, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of an array where its symbols have these sizes."""
    return tuple(evaluate_dim(dim, sizes) for dim in kind.shape)
