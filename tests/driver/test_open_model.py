"""Whatever stands for a model: artifacts, recipes, names, checkpoints, hub ids; compiled once."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from infc.driver.bundled import BundledRecipe, bundled_recipes
from infc.driver.cache import ArtifactCache
from infc.driver.cli import run
from infc.driver.compile import compile_cached
from infc.driver.open_model import artifact_path, is_artifact, open_model
from infc.driver.workplaces import one_at_a_time, temporary_output
from infc.ir.artifact import open_artifact
from infc.ir.errors import CheckpointError, InfcError, RecipeError, UsageError

from ..checkpoints import make_checkpoint
from ..ir.artifacts import write_artifact
from ..runtime.small_artifact import write_small_artifact
from .compiling import Lines

QUICK = ["backend=reference", "dtype=float32"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a checkpoint of two layers."""
    place = tmp_path_factory.mktemp("source")
    make_checkpoint("llama", place / "checkpoint", tokenizer=True, num_hidden_layers=2)
    return place


def hub_cache(checkpoint: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of the hub as its client leaves it, with one model, and no way to the hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = home / "hub/models--someone--small-llama"
    snapshot = repository / "snapshots" / ("0123abcd" * 5)
    shutil.copytree(checkpoint, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123abcd" * 5)


def test_a_server_names_what_was_asked_for(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from infc.driver.open_model import artifact_and_names

    def names(model: str) -> tuple[str, ...]:
        return artifact_and_names(model, tuple(QUICK))[1]

    hub_cache(source / "checkpoint", tmp_path, monkeypatch)
    monkeypatch.setitem(bundled_recipes(), "small", BundledRecipe("small", tmp_path / "hub.yaml"))
    (tmp_path / "hub.yaml").write_text("model: someone/small-llama\n")
    monkeypatch.chdir(tmp_path)
    assert names(str(source / "checkpoint")) == (source.name,)
    assert names("someone/small-llama") == ("someone/small-llama",)
    assert names("small") == ("small", "someone/small-llama")
    made = write_artifact(tmp_path / "a")
    assert artifact_and_names(str(made), ()) == (made, ()), "the server takes its directory's"


def test_a_model_is_compiled_once(source: Path, tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text(f"model: {source / 'checkpoint'}\n")
    told = Lines()
    first = artifact_path(source / "checkpoint", QUICK, told)
    assert first.parent == ArtifactCache().place("x").parent
    assert told.lines[0] == f"compiling {source.name} (next time, it is taken from the cache)"
    again = Lines()
    for model in (source / "checkpoint", tmp_path / "model.yaml", tmp_path):
        assert artifact_path(model, QUICK, again).name == first.name
    assert again.lines == []
    assert artifact_path(first) == first, "an artifact stands for itself"
    assert artifact_path(source / "checkpoint", [*QUICK, "runtime.max_sequences=2"], told) != first


def test_a_hub_id_is_compiled_from_the_hub_s_cache(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_cache(source / "checkpoint", tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert run(["compile", "someone/small-llama", "-q", "--set", QUICK[0], "--no-verify"]) == 0
    made = open_artifact(tmp_path / "small-llama.infc")
    assert made.manifest.recipe["model"] == "someone/small-llama"
    with pytest.raises(CheckpointError, match="the hub does not provide 'someone/other'"):
        artifact_path("someone/other")


def test_only_what_is_no_artifact_takes_keys_of_a_recipe(tmp_path: Path) -> None:
    made = write_artifact(tmp_path / "a")
    assert open_model(made).path == made
    with pytest.raises(UsageError, match=r"a: --set dtype=float32 .* compiled artifact"):
        open_model(made, ["dtype=float32"])


def test_what_is_an_artifact(tmp_path: Path) -> None:
    assert is_artifact(write_artifact(tmp_path / "here"))
    assert is_artifact("gone.infc"), "the name says what was meant"
    assert not is_artifact("org/name")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "manifest.json").write_text("{}")
    assert not is_artifact(tmp_path), "a checkpoint, with a file of somebody else"


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        ("tinny", RecipeError, "tinny: no such file, directory or bundled recipe (did you mean 't"),
        ("nothing-of-the-kind", RecipeError, "`infc recipe list` shows the recipes"),
        ("gone.yaml", RecipeError, "gone.yaml: no such file"),
        (
            "empty",
            RecipeError,
            "neither a model.yaml nor the config.json of a checkpoint, and is no",
        ),
        ("above", RecipeError, "(did you mean above/below?)"),
        ("a/b/c", RecipeError, "no such file, directory or bundled recipe"),
    ],
)
def test_what_is_no_model(
    model: str,
    kind: type[InfcError],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "above/below").mkdir(parents=True)
    (tmp_path / "above/below/config.json").write_text("{}")
    with pytest.raises(kind) as caught:
        artifact_path(model)
    assert message in str(caught.value)


def test_compiling_an_artifact_says_that_it_is_one(tmp_path: Path) -> None:
    made = write_artifact(tmp_path / "made")
    with pytest.raises(RecipeError, match="this is a compiled artifact, not a recipe"):
        compile_cached(made, progress=Lines())


@pytest.mark.parametrize("reason", ["limit", "pass"])
def test_what_the_cache_does_not_keep_lasts_as_long_as_the_process(
    reason: str, source: Path, tmp_path: Path, own_cache: Path
) -> None:
    recipe = f"model: {source / 'checkpoint'}\nbackend: reference\n"
    if reason == "pass":
        (tmp_path / "own_pass_here.py").write_text(
            "from infc import ops, rewrite\n"
            "Twice = rewrite('twice', lambda x: ops.neg(ops.neg(x)), lambda x: x)\n"
        )
        recipe += "passes: {'own_pass_here:Twice': {before: fuse-rms-norm}}\n"
    (tmp_path / "model.yaml").write_text(recipe)
    words = [
        sys.executable,
        "-m",
        "infc",
        "run",
        "model.yaml",
        "the cat",
        "--raw",
        "--max-tokens",
        "2",
    ]
    environment = {**os.environ, "XDG_CACHE_HOME": str(own_cache.parent)}
    if reason == "limit":
        environment["INFC_CACHE_LIMIT"] = "0"
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "for this process only" in done.stderr
    assert list((own_cache / "temporary").iterdir()) == []
    assert not (own_cache / "artifacts").exists()


def test_what_a_kill_leaves_is_swept(own_cache: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path\n"
        "from infc.driver.workplaces import temporary_output\n"
        "temporary_output(Path(sys.argv[1])).mkdir(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", script, str(own_cache)], check=False)
    mine = temporary_output(own_cache)
    assert len(list((own_cache / "temporary").glob(".*-partial-*"))) == 2
    ArtifactCache().sweep()
    assert list((own_cache / "temporary").glob(".*-partial-*")) == [mine.parent]


def test_an_artifact_beyond_the_limit_is_still_used(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFC_CACHE_LIMIT", "1KB")
    path = artifact_path(source / "checkpoint", QUICK, Lines())
    assert open_artifact(path).manifest.model.num_layers == 2


def test_two_processes_do_not_compile_the_same_at_once(own_cache: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from infc.driver.workplaces import one_at_a_time\n"
        "with one_at_a_time(Path(sys.argv[1]), 'key', lambda: print('waits', flush=True)):\n"
        "    print('mine', flush=True)\n"
    )
    with one_at_a_time(own_cache, "key", lambda: None):
        command = [sys.executable, "-c", script, str(own_cache)]
        other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert other.stdout is not None
        assert other.stdout.readline() == "waits\n"
    assert other.communicate(timeout=30)[0] == "mine\n"


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match="the cache cannot be written: Not a directory"),
        one_at_a_time(tmp_path / "file/infc", "key", lambda: None),
    ):
        pass


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with a chat template."""
    return write_small_artifact(tmp_path_factory.mktemp("small") / "small")


def answered(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command wrote that must succeed."""
    assert run([*words, "--max-tokens", "3", "--ignore-eos"]) == 0
    return capsys.readouterr().out


def test_run_sends_a_message_or_the_text(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(small)
    asked = answered(capsys, "run", path, "the cat")
    assert asked == answered(capsys, "generate", path, "--chat", "the cat")
    continued = answered(capsys, "run", path, "--raw", "the cat")
    assert continued == answered(capsys, "generate", path, "the cat")
    assert asked != continued


def test_prompts_from_files_and_pipes(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes("the cat\non the mät\n".encode())
    for command in ("run", "generate"):
        given = answered(capsys, command, str(small), file.read_text())
        assert given == answered(capsys, command, str(small), "-f", str(file))
        for words in ([], ["-f", "-"], ["-"]):
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes())))
            assert given == answered(capsys, command, str(small), *words)
        for words, message in (
            (["x", "-f", str(file)], "there are two prompts"),
            (["-f", str(tmp_path / "gone")], "gone: cannot be read: No such file or directory"),
        ):
            assert run([command, str(small), *words]) == 2
            assert message in capsys.readouterr().err


class Terminal(io.StringIO):
    """Lines that somebody types."""

    def isatty(self) -> bool:
        return True


def test_run_on_a_terminal_is_a_conversation(
    small: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["the cat", "/exit"])
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert run(["run", str(small), "--max-tokens", "3", "--ignore-eos"]) == 0
    written = capsys.readouterr()
    assert "/exit or Ctrl-D ends it" in written.err
    assert written.out == answered(capsys, "generate", str(small), "--chat", "the cat")


def test_run_without_a_template(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(write_small_artifact(tmp_path / "small", with_template=False))
    assert answered(capsys, "run", path, "the cat") == answered(capsys, "generate", path, "the cat")
    assert run(["run", path, "x", "--system", "y"]) == 2
    assert "the model has no chat template, so --system cannot be used" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", Terminal())
    assert run(["run", path]) == 2
    assert (
        "no prompt, and the model has no chat template (pass one, or use -f FILE)"
        in capsys.readouterr().err
    )


def test_a_server_looks_at_its_address_before_it_compiles(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile_it(*_: object) -> None:
        raise AssertionError("it was compiled first")

    monkeypatch.setattr("infc.driver.open_model.artifact_and_names", compile_it)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["serve", str(source / "checkpoint"), "--port", str(port)]) == 2
    assert f"127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt_is_not_answered(
    prompt: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = str(write_small_artifact(tmp_path / "small"))
    assert run(["run", path, prompt]) == 2
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    assert run(["run", path]) == 2
    assert capsys.readouterr().err.count("the prompt is empty (pass one") == 2
