"""A GGUF file is a model wherever a checkpoint is: recipes, commands, Python, the cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import infc
from infc.driver.cache import cache_key, checkpoint_identity
from infc.driver.cli import run
from infc.driver.compile import compile_cached
from infc.driver.model_source import find_model
from infc.driver.open_model import is_artifact
from infc.driver.recipe import load_recipe
from infc.ir.errors import ArtifactError, RecipeError
from infc.ir.text import parse_program

from ..gguf_files import make_gguf
from .compiling import Lines

QUICK = ["backend=reference", "dtype=float32", "runtime.max_context=64"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small-Q0.gguf"
    make_gguf("llama", path, tokenizer=True)
    return path


def test_a_path_is_a_recipe_of_defaults(file: Path, tmp_path: Path) -> None:
    loaded = load_recipe(file)
    assert (loaded.recipe.model, loaded.directory) == (file.name, file.parent)
    assert find_model(loaded.recipe, loaded.directory) == file
    assert not is_artifact(file)
    # As the hub's cache has it: the link has the name, what it leads to has none.
    blob = tmp_path / "blobs" / "abc123"
    blob.parent.mkdir()
    shutil.copy(file, blob)
    (tmp_path / "linked.gguf").symlink_to(blob)
    linked = load_recipe(tmp_path / "linked.gguf")
    assert find_model(linked.recipe, linked.directory).name in ("linked.gguf", "abc123")


def test_a_recipe_names_a_file(file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "model.yaml"
    recipe.write_text(f"model: {os.path.relpath(file, tmp_path)}\n")
    loaded = load_recipe(recipe)
    assert find_model(loaded.recipe, loaded.directory) == file
    recipe.write_text(f"model: {file}\nrevision: main\n")
    loaded = load_recipe(recipe)
    with pytest.raises(RecipeError, match="the model is a file, which has no revision 'main'"):
        find_model(loaded.recipe, loaded.directory)


def test_a_directory_of_one_file_is_pointed_at(file: Path) -> None:
    with pytest.raises(RecipeError, match=rf"did you mean .*{file.name}\?"):
        load_recipe(file.parent)


def test_the_key_is_of_the_bytes(file: Path, tmp_path: Path) -> None:
    copy = tmp_path / "other.gguf"
    shutil.copy(file, copy)
    assert checkpoint_identity(copy) == checkpoint_identity(file)
    assert cache_key({}, copy) == cache_key({}, file)
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    assert checkpoint_identity(copy) != checkpoint_identity(file)
    assert cache_key({}, copy) != cache_key({}, file)


def test_compiled_once_and_it_writes(file: Path) -> None:
    lines = Lines()
    artifact = compile_cached(file, overrides=QUICK, progress=lines)
    assert artifact.manifest.recipe["model"] == "small-Q0"
    assert artifact.manifest.checkpoint == checkpoint_identity(file)
    assert "compiling small-Q0 (next time, it is taken from the cache)" in lines.lines
    again = Lines()
    assert compile_cached(file, overrides=QUICK, progress=again).path == artifact.path
    assert again.lines == []
    llm = infc.LLM(artifact)
    answer = llm.chat([{"role": "user", "content": "hi"}], infc.SamplingParams(max_tokens=4))
    assert answer.outputs[0].token_ids


def test_the_default_output_is_named_after_the_file(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sets = [argument for one in QUICK for argument in ("--set", one)]
    assert run(["compile", str(file), *sets, "--no-verify", "-q"]) == 0
    assert (tmp_path / "small-Q0.infc" / "manifest.json").is_file()
    with pytest.raises(ArtifactError, match="the output is inside the checkpoint, or contains it"):
        infc.compile(file, file.parent, cache=False)


@pytest.mark.parametrize(("name", "is_tied"), [("gemma3", True), ("llama", False)])
def test_a_table_is_stored_once_if_it_is_the_head(name: str, is_tied: bool, tmp_path: Path) -> None:
    make_gguf(name, tmp_path / "model.gguf", tokenizer=True)
    output = tmp_path / "out.infc"
    overrides = [*QUICK, "quantization=int8"]
    artifact = infc.compile(tmp_path / "model.gguf", output, overrides=overrides, cache=False)
    program = parse_program((artifact.path / "program.ir").read_text())
    (table,) = (node for node in program.nodes if node.op == "scaled_embedding")
    head = next(node for node in reversed(program.nodes) if node.op == "scaled_linear")
    assert (table.inputs[:2] == head.inputs[2:]) == is_tied
    vocab = artifact.manifest.model.vocab_size
    tables = [one for one in program.weights.values() if one.type.shape[0] == vocab]
    assert len(tables) == (2 if is_tied else 4), "codes and scales of each"


def test_a_file_that_is_cut_off_is_refused_in_one_line(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(file.read_bytes()[:-5000])
    assert run(["compile", str(path), "-q", "-o", str(tmp_path / "out")]) == 3
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: tensor ")
    assert error.count("\n") == 1
    assert "the file is truncated (download the file again" in error
    assert not (tmp_path / "out").exists()
