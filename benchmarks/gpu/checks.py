"""Whether kernels mean on this GPU what the ops mean: single ops, and whole steps of models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from infc.ir.interpret import interpret
from infc.ir.program import Program, Value
from infc.ir.types import DType
from infc.ir.weights import program_weights
from tests.codegen.harness import Chunk, make_step
from tests.codegen.op_cases import CASES, VOCAB, Case, gates, linear_bias, program_of
from tests.codegen.triton.running import Runner

from .process import OnDevice
from .setting import Results, Setting

TOKENS = 19
BOUNDS = {DType.F32: 3e-6, DType.BF16: 2e-2}


def check_ops(setting: Setting, names: frozenset[str] | None = None) -> Results:
    """The largest error of each op, relative to the largest result, and its bound."""
    process = OnDevice(setting.driver, setting.target, setting.folder / "kernels")
    found: Results = {}
    for make in CASES:
        if names is None or make.__name__ in names:
            for dtype, bound in BOUNDS.items():
                found[f"{make.__name__} {dtype.value}"] = _check(process, make, dtype, None, bound)
    for make in (linear_bias, gates):
        if names is None or make.__name__ in names:
            name = f"{make.__name__} f32 by bf16"
            found[name] = _check(process, make, DType.F32, DType.BF16, 2e-3)
    wrong = [name for name, one in found.items() if not one["fine"]]
    return {"cases": found, "wrong": wrong}


def _check(
    process: OnDevice,
    make: Callable[[Case], Value],
    dtype: DType,
    held: DType | None,
    bound: float,
) -> dict[str, Any]:
    program = program_of(make, dtype, held)
    try:
        found, wanted = outcome(program, process)
    except Exception as error:  # the others are to be seen, too
        return {"fine": False, "error": f"{type(error).__name__}: {error}"[:300]}
    largest = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    return {"fine": largest < bound, "error": largest, "bound": bound}


def outcome(program: Program, process: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the kernels give, and what the ops mean."""
    ids = np.random.default_rng(5).integers(0, VOCAB, TOKENS)
    inputs = {"input_ids": torch.tensor(ids)}
    if any(value.name == "positions" for value in program.inputs):
        inputs["positions"] = torch.arange(TOKENS)
    (wanted,) = interpret(program, inputs, program_weights(program))
    step = make_step([Chunk(ids.tolist(), 0, [1, 2])], num_groups=0, block_size=16)
    found = Runner(program, program_weights(program), process).run(step)
    return found.logits, wanted.float().numpy()
