"""The default output: the model's own name, and no other model's artifact is lost to it."""

import shutil
from pathlib import Path

import pytest

import infc
from infc.ir.artifact import Artifact, open_artifact
from infc.ir.errors import ArtifactError

from ..checkpoints import make_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a checkpoint of two layers."""
    place = tmp_path_factory.mktemp("source")
    make_checkpoint("llama", place / "checkpoint", tokenizer=True, num_hidden_layers=2)
    return place


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("models/qwen2-bf16", "qwen2-bf16"),
        ("models/tiny/checkpoint", "tiny"),
        ("hub/models--Qwen--Qwen2-0.5B/snapshots/0123abcd", "Qwen2-0.5B"),
    ],
)
def test_the_default_name_is_the_model_s(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, name: str
) -> None:
    directory = tmp_path / place
    shutil.copytree(source / "checkpoint", directory)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {place}\n")
    monkeypatch.chdir(tmp_path)
    options = ["backend=reference", "dtype=float32"]
    for given in (directory, recipe):
        made = infc.compile(given, overrides=options, verify=False)
        assert made.path == tmp_path / f"{name}.infc"
        assert made.manifest.recipe["model"] == name


@pytest.mark.parametrize("cached", [False, True])
def test_the_default_output_keeps_another_model(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    def compile_here(place: str, output: Path | None = None) -> Artifact:
        return infc.compile(
            tmp_path / place / "same", output, overrides=["backend=reference"], verify=False
        )

    shutil.copytree(source / "checkpoint", tmp_path / "a/same")
    make_checkpoint("llama", tmp_path / "b/same", tokenizer=True, num_hidden_layers=1)
    if cached:
        compile_here("b", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    first = compile_here("a")
    with pytest.raises(ArtifactError, match=r"same.infc: it holds another model \(llama, "):
        compile_here("b")
    assert open_artifact(first.path).identity == first.identity
    assert compile_here("a").identity == first.identity
    assert compile_here("b", first.path).identity != first.identity
