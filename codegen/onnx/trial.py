"""What the trial step of a model should give: its program, interpreted."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from ...ir.errors import ProgramError
from ...ir.interpret import Interpreter
from ...ir.paged_state import PagedState
from ...ir.program import LOGITS, STEP_INPUTS, Program
from ...ir.quantized_pairs import QuantizedPairs
from ...ir.types import DType
from ...ir.weights import evaluate_weight

if TYPE_CHECKING:
    import torch

MOST_BYTES: Final = 300 << 20
"""Weights of the largest program that is interpreted: those of about 70 M parameters in float32."""
_BLOCK: Final = 16
_ROUTED: Final = frozenset({"moe", "scaled_moe", "quantize_rows"})
"""Ops by which a last bit becomes another expert or another code, and so another result."""
_BOUNDS: Final = {True: 0.1, False: 1e-3}
"""Largest error of a logit, relative to the largest logit, with matrices of 16 bits and without."""


def expected_logits(program: Program, pairs: QuantizedPairs) -> NDArray[np.float32] | None:
    """Logits of the second of tokens 0 and 1; None of programs that are not compared."""
    import torch

    size = sum(weight.type.num_bytes() for weight in program.weights.values())
    is_routed = any(node.op in _ROUTED for node in program.nodes)
    has_others = any(value.name not in STEP_INPUTS for value in program.inputs)
    if size > MOST_BYTES or is_routed or has_others or LOGITS not in program.named_outputs():
        return None
    groups = tuple(replace(group, block_size=_BLOCK) for group in program.resources)
    state = PagedState.allocate(groups, 2)
    tokens = torch.tensor([0, 1])
    tables = {group.name: torch.tensor([[1]]) for group in groups}
    state.set_step(tokens, torch.tensor([0, 2]), torch.tensor([2]), tables)
    inputs = {"input_ids": tokens, "positions": tokens, "logits_index": torch.tensor([1])}
    given = {value.name: inputs[value.name] for value in program.inputs}

    def weight(name: str) -> torch.Tensor:
        return evaluate_weight(program, name, pairs=pairs)

    results = Interpreter(replace(program, resources=groups), weight, state).run(given)
    logits: NDArray[np.float32] = results[[*program.named_outputs()].index(LOGITS)].float().numpy()
    return logits[-1:]


def check_logits(program: Program, found: NDArray[Any], expected: NDArray[np.float32]) -> None:
    """ProgramError where a model gives other logits than its program."""
    is_narrow = any(one.type.dtype in (DType.BF16, DType.F16) for one in program.weights.values())
    error = float(np.abs(found[-1:] - expected).max() / max(np.abs(expected).max(), 1e-30))
    if not error <= _BOUNDS[is_narrow]:
        raise ProgramError(
            f"the model in ONNX gives other logits than its program: an error of {error:.2g}",
            where=program.name,
            hint="this is a bug of the backend onnx: please report it; --no-verify skips this",
        )
