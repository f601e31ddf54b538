"""What parity tests compare: transformers' eager logits, and those of a captured program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from infc.ir.interpret import interpret
from infc.ir.program import Program
from infc.ir.weights import program_weights

from ..configs.base import VOCAB_SIZE

PROMPT_TOKENS = 40
ROWS = (0, 1, 7, 8, 9, 20, 39)


def no_log(line: str) -> None:
    """Takes a line and does nothing with it."""


def prompt(seed: int = 0, tokens: int = PROMPT_TOKENS) -> torch.Tensor:
    """Random token ids `[tokens]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB_SIZE, (tokens,), generator=generator)


def eager_model(directory: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint as transformers loads it, with its own eager attention."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=dtype
    )
    return model.eval()


def eager_logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits `[T, V]` of transformers in float32."""
    with torch.no_grad():
        logits = eager_model(directory)(input_ids=ids[None]).logits[0]
    assert isinstance(logits, torch.Tensor)
    return logits


def captured_logits(
    program: Program, ids: torch.Tensor, rows: tuple[int, ...], override: str | None = None
) -> torch.Tensor:
    """Logits `[rows, V]` of a program on the ops' meanings."""
    inputs = {
        "input_ids": ids,
        "positions": torch.arange(len(ids)),
        "logits_index": torch.tensor(rows),
    }
    return interpret(program, inputs, program_weights(program), dtype_override=override)[0]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest expected size."""
    return float((got - expected).abs().max() / expected.abs().max())


def parity_error(directory: Path, program: Program, ids: torch.Tensor | None = None) -> float:
    """The relative error of a program against transformers on one prompt."""
    ids = prompt() if ids is None else ids
    rows = tuple(row for row in ROWS if row < len(ids))
    expected = eager_logits(directory, ids)[list(rows)]
    return relative_error(captured_logits(program, ids, rows), expected)
