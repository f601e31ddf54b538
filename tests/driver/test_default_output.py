"""The default output: the model's own name, and no other model's artifact is lost to it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import infc
from infc.driver.cli import run
from infc.driver.rebuild import rebuild_artifact
from infc.ir.artifact import Artifact, ArtifactWriter, open_artifact
from infc.ir.errors import ArtifactError

from ..checkpoints import make_checkpoint
from ..ir.artifacts import fill, manifest, write_artifact
from .compiling import Lines


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
def test_the_default_output_keeps_another_checkpoint(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    """Of the same name and shape, where only the weights tell."""

    def compile_here(place: str, output: Path | None = None, force: bool = False) -> Artifact:
        options = ["backend=reference"]
        checkpoint = tmp_path / place / "same"
        return infc.compile(checkpoint, output, overrides=options, force=force, verify=False)

    shutil.copytree(source / "checkpoint", tmp_path / "a/same")
    shutil.copytree(source / "checkpoint", tmp_path / "b/same")
    weights = load_file(tmp_path / "b/same/model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, tmp_path / "b/same/model.safetensors", {"format": "pt"})
    if cached:
        compile_here("b", tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    first = compile_here("a")
    with pytest.raises(ArtifactError, match=r"same.infc: it was made from another checkpoint"):
        compile_here("b")
    assert open_artifact(first.path).identity == first.identity
    # The same checkpoint elsewhere, with other words around its weights, is the same checkpoint.
    shutil.move(tmp_path / "a", tmp_path / "c")
    (tmp_path / "c/same/chat_template.jinja").write_text("{{ messages }}")
    second = compile_here("c")
    assert second.identity != first.identity
    third = compile_here("b", force=True)
    assert third.manifest.checkpoint != second.manifest.checkpoint
    assert compile_here("c", first.path).identity == second.identity


def test_the_command_says_how_to_replace(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_artifact(tmp_path / "source.infc")
    shutil.copytree(source, tmp_path / "source")
    command = ["compile", "source/checkpoint", "-q", "--no-verify", "--set", "backend=reference"]
    assert run(command) == 7
    assert "(name another output with -o, or replace it with --force)" in capsys.readouterr().err
    assert run([*command, "--force"]) == 0


def test_rebuilding_keeps_another_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("a/same.infc", "same-x86-64-v3.infc"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        with ArtifactWriter(tmp_path / place) as writer:
            fill(writer.path)
            writer.commit(replace(manifest(), checkpoint=place))
    monkeypatch.chdir(tmp_path)
    kept = open_artifact("same-x86-64-v3.infc").identity
    with pytest.raises(
        ArtifactError, match=r"another checkpoint .*\(name another output with -o\)"
    ):
        rebuild_artifact("a/same.infc", "x86-64-v3")
    assert open_artifact("same-x86-64-v3.infc").identity == kept


def test_other_options_of_what_is_replaced_are_named(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Lines()
    monkeypatch.chdir(tmp_path)
    for scheme in ("int8", "int8", "none"):
        options = ["backend=reference", "dtype=float32", f"quantization.scheme={scheme}"]
        infc.compile(source / "checkpoint", overrides=options, verify=False, progress=progress)
    about = [line for line in progress.lines if "replacing" in line]
    assert len(about) == 1
    assert "had other options (quantization.scheme: int8 -> none)" in about[0]
