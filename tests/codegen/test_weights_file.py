"""Writing weights: what is said to be done is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infc.codegen.base import EmitOptions
from infc.codegen.weights_file import write_weights
from infc.ir.builder import ProgramBuilder
from infc.ir.program import ModelSpec, Weight
from infc.ir.safetensors import MappedSafetensors
from infc.ir.types import DType, TensorType

ROWS = (3, 5, 2)


def test_progress_counts_what_was_written(tmp_path: Path) -> None:
    """Before a weight is made, those before it are in the file; at the end all are."""
    builder = ProgramBuilder("some", ModelSpec("some", 1, 64, 1, 1, 64, 100, 100))
    for index, rows in enumerate(ROWS):
        builder.weight(f"w{index}", TensorType(DType.F32, (rows, 64)))
    program = builder.build()
    said: list[tuple[int, int, int]] = []
    asked: list[str] = []

    def stored(weight: Weight) -> NDArray[Any]:
        asked.append(weight.name)
        return np.zeros([int(str(size)) for size in weight.type.shape], "<f4")

    options = EmitOptions(
        on_weight=lambda done, total: said.append((done, total, len(asked))), stored=stored
    )
    write_weights(program, list(program.weights.values()), tmp_path / "w.safetensors", options)
    row, total = 4 * 64, 4 * 64 * sum(ROWS)
    assert said == [(0, total, 0), (3 * row, total, 1), (8 * row, total, 2), (total, total, 3)]
    assert MappedSafetensors(tmp_path / "w.safetensors").names() == asked == ["w0", "w1", "w2"]
