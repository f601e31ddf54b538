"""Engines that TensorRT-RTX builds here, without a GPU; none of them is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infc.ir.artifact import Artifact
from infc.ir.safetensors import read_header
from infc.ir.tensorrt_engine import EngineFacts

from ...checkpoints import make_checkpoint
from ...e2e.support import compile_checkpoint

trt = pytest.importorskip("tensorrt_rtx", reason="builds engines: pip install 'infc[tensorrt]'")

SMALL: dict[str, Any] = {
    "runtime.max_context": 64,
    "runtime.max_sequences": 4,
    "runtime.step_tokens": 32,
    "runtime.logit_rows": 4,
    "tensorrt.decode_buckets": [4],
}


def engine(
    directory: Path, arch: str, *, target: str = "sm_89", dtype: str = "bfloat16", **sets: Any
) -> Artifact:
    """A model of two layers, compiled for TensorRT."""
    checkpoint = make_checkpoint(arch, directory / arch, dtype=dtype, num_hidden_layers=2)
    settings = {**SMALL, "target": target, **sets}
    return compile_checkpoint(
        checkpoint, directory / "engine.infc", backend="tensorrt", dtype=dtype, **settings
    )


def facts_of(artifact: Artifact) -> EngineFacts:
    """What describes the engine."""
    return EngineFacts.parse(artifact.read_text("engine.json"), where="")


def test_one_engine_for_several_chips_holds_the_weights(tmp_path: Path) -> None:
    sets: dict[str, Any] = {"tensorrt.chips": ["sm_80", "sm_120"]}
    artifact = engine(tmp_path, "llama", **sets)
    facts = facts_of(artifact)
    assert facts.chips == ("sm_89", "sm_80", "sm_120")
    assert (facts.library, facts.version) == ("tensorrt_rtx", trt.__version__)
    assert [(one.decode, one.rows, one.queries) for one in facts.profiles] == [
        (True, 4, 1),
        (False, 4, 32),
    ]
    assert artifact.entry_path.stat().st_size == facts.num_bytes
    assert read_header(artifact.weights_path)[0] == {} and facts.weights == ()
    assert artifact.manifest.target.name == "sm_89"
    recipe = json.loads((artifact.path / "manifest.json").read_text())["recipe"]
    assert recipe["tensorrt"]["chips"] == ["sm_80", "sm_120"]
