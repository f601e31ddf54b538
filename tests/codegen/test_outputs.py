"""What leaves a step: the token of each row, and the rows of logits that are wanted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from infc.ir.builder import ProgramBuilder
from infc.ir.program import Program
from infc.ir.target import resolve_target
from infc.ir.types import DType, Sym, TensorType
from infc.runtime.executors.base import wanted_rows
from infc.runtime.step import Step

from .harness import Chunk, build, make_step, open_cpp, with_weights

WIDTH = 75
TARGETS = ("native", "x86-64-v2")


def program(table: torch.Tensor, dtype: DType) -> Program:
    """A program whose logits are the rows of `table` that the token ids name."""
    b = ProgramBuilder("rows", phase="planned")
    b.symbol("T", 1, 64)
    b.symbol("R", 1, 64)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
    index = b.input("logits_index", TensorType(DType.I64, (Sym("R"),)))
    weight = b.weight("table", TensorType(dtype, tuple(table.shape)))
    b.outputs = [b.emit("take", b.emit("embedding", weight, ids), index, dim=0)]
    made = b.build()
    made = replace(made, spec=replace(made.spec, vocab_size=table.shape[1]))
    return with_weights(made, {"table": table})


def rows_of(kind: torch.dtype) -> torch.Tensor:
    """Rows with equals, NaN, infinities of both signs, and a greatest at every place."""
    table = torch.randn(WIDTH + 8, WIDTH, generator=torch.Generator().manual_seed(0))
    table[range(WIDTH), range(WIDTH)] = 9.0
    table[WIDTH] = 1.0
    table[WIDTH + 1, [3, 40, 74]] = 8.0
    table[WIDTH + 2, [74, 19]] = 8.0
    table[WIDTH + 3, 70] = torch.nan
    table[WIDTH + 4, 5] = torch.inf
    table[WIDTH + 5] = -torch.inf
    table[WIDTH + 6] = -torch.inf
    table[WIDTH + 6, 33] = -3.0
    table[WIDTH + 7] = -table[WIDTH + 7].abs()
    return table.to(kind)


def asking(step: Step, rows: list[int] | None) -> Step:
    """The step with room for tokens, and logits wanted of `rows`."""
    wanted = None if rows is None else np.array(rows, np.int32)
    tokens = np.full(len(step.logits_index), 99, np.int32)
    return replace(step, tokens=tokens, logits_rows=wanted)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16], ids=lambda d: d.value)
def test_tokens_and_wanted_rows(
    dtype: DType, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infc.ir.weights.require_finite", lambda *_: None)  # NaN is wanted here
    table = rows_of({DType.F32: torch.float32, DType.BF16: torch.bfloat16}[dtype])
    artifact = build(program(table, dtype), tmp_path / "a", resolve_target(target))
    values: NDArray[np.float32] = table.float().numpy()
    for threads in (1, 2):
        executor = open_cpp(artifact, num_threads=threads)
        for first in (0, WIDTH + 8 - 64):
            ids = list(range(first, first + 64))
            chunk = Chunk(ids, 0, [1] * 4)
            plain = make_step([chunk], num_groups=0, block_size=16)
            plain = replace(plain, logits_index=np.arange(64, dtype=np.int32))
            for rows in (None, [], [0, 5, 63]):
                step, expected = asking(plain, rows), asking(plain, rows)
                logits = executor.run(step)
                np.testing.assert_array_equal(logits, wanted_rows(expected, values[ids]))
                assert step.tokens is not None and expected.tokens is not None
                assert step.tokens.tolist() == expected.tokens.tolist()
