"""Writes an artifact's weights: one at a time, in the order that the code indexes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from ..ir.program import Program, Weight
from ..ir.safetensors import write_safetensors
from ..ir.weights import evaluate_weight
from .base import EmitOptions

if TYPE_CHECKING:
    import torch


def write_weights(
    program: Program, weights: Sequence[Weight], path: Path, options: EmitOptions
) -> None:
    """Make each weight, or take it as stored, and write it; but for those that are shared.

    CheckpointError names the first that cannot be made.
    """
    if options.shared is not None:
        common = set(options.shared.among(program, weights))
        weights = [weight for weight in weights if weight.name not in common]
    by_name = {weight.name: weight for weight in weights}
    total_bytes = sum(weight.type.num_bytes() for weight in weights)
    done_bytes = 0

    def advance() -> None:
        if options.on_weight is not None:
            options.on_weight(done_bytes, total_bytes)

    def produce(name: str) -> torch.Tensor | NDArray[Any]:
        nonlocal done_bytes
        advance()  # whatever was asked for before has been written
        weight = by_name[name]
        done_bytes += weight.type.num_bytes()
        if options.stored is not None:
            return options.stored(weight)
        return evaluate_weight(program, weight, pairs=options.pairs)

    write_safetensors(path, [(weight.name, weight.type) for weight in weights], produce)
    advance()
