"""Small models, compiled for TensorRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from infc.ir.artifact import Artifact
from infc.ir.tensorrt_engine import EngineFacts

from ...checkpoints import make_checkpoint
from ...e2e.support import compile_checkpoint

SMALL: Final[dict[str, Any]] = {
    "runtime.max_context": 64,
    "runtime.max_sequences": 4,
    "runtime.step_tokens": 32,
    "runtime.logit_rows": 4,
    "tensorrt.decode_buckets": [4],
}
"""As little as makes an engine quickly: one bucket, one profile of chunks."""


def engine(
    directory: Path,
    arch: str = "llama",
    *,
    target: str = "sm_89",
    dtype: str = "bfloat16",
    layers: int = 2,
    **sets: Any,
) -> Artifact:
    """A model of few layers, compiled for TensorRT."""
    stored = "bfloat16" if dtype == "float16" else dtype
    checkpoint = make_checkpoint(arch, directory / arch, dtype=stored, num_hidden_layers=layers)
    settings = {**SMALL, "target": target, **sets}
    return compile_checkpoint(
        checkpoint, directory / "engine.infc", backend="tensorrt", dtype=dtype, **settings
    )


def facts_of(artifact: Artifact) -> EngineFacts:
    """What describes the engine."""
    return EngineFacts.parse(artifact.read_text("engine.json"), where="")
