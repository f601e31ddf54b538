"""Models far smaller than real ones: narrow rows, and a vocabulary of one token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import infc

from ..checkpoints import make_checkpoint

NARROW: dict[str, Any] = {
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
}


@pytest.mark.parametrize("scheme", ["int8", "int4-token"])
def test_narrow_matrices_are_quantized(scheme: str, tmp_path: Path) -> None:
    """Rows of 4 sums, all of them small now and then, are held to what others allow."""
    source = make_checkpoint("llama", tmp_path / "model", seed=1, intermediate_size=8, **NARROW)
    options = ["backend=reference", f"quantization={scheme}", "quantization.method=nearest"]
    infc.compile(source, tmp_path / "out", overrides=options, cache=False, progress=False)


def test_a_vocabulary_of_one_token(tmp_path: Path) -> None:
    source = make_checkpoint("llama", tmp_path / "model", vocab_size=1)
    infc.compile(source, tmp_path / "out.infc", cache=False, progress=False)
    with infc.LLM(tmp_path / "out.infc") as llm:
        params = infc.SamplingParams(max_tokens=3, temperature=1.0, seed=1)
        (output,) = llm.generate([[0, 0]], params)
    assert output.outputs[0].token_ids == (0, 0, 0)
