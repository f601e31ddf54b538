"""What these tests share: ceilings that nobody need measure, and artifacts to run."""

from __future__ import annotations

from pathlib import Path

import pytest

import infc
from infc.ir.artifact import Artifact, open_artifact
from infc.ir.roofline import Ceilings

from ...checkpoints import make_checkpoint
from ...runtime.small_artifact import write_small_artifact

RECIPE = "model: ./checkpoint\nbackend: cpp\nruntime: {step_tokens: 64, max_sequences: 4}\n"


@pytest.fixture
def slow() -> Ceilings:
    """A machine of a thousand bytes and as many operations a second, bytes cheaper by a half."""
    return Ceilings(threads=1, read=1e3, fp32=1e3, bf16=2e3, int8=4e3)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A hand-written artifact of the reference backend: 96 tokens of context, four sequences."""
    return open_artifact(write_small_artifact(tmp_path_factory.mktemp("small") / "small"))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A small model of two layers by the cpp backend, for this machine."""
    place = tmp_path_factory.mktemp("compiled")
    make_checkpoint("llama", place / "checkpoint", tokenizer=True, num_hidden_layers=2)
    recipe = Path(place / "model.yaml")
    recipe.write_text(RECIPE)
    return infc.compile(recipe, place / "artifact", cache=False)
