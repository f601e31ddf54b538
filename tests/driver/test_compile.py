"""Compilation: the same bytes everywhere, and nothing left behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import infc
from infc.codegen.cpp.backend import CppBackend
from infc.driver.progress import Reporter
from infc.driver.recipe import Recipe
from infc.ir.artifact import Artifact
from infc.ir.errors import ArtifactError, CheckpointError, PassError, RecipeError, UsageError
from infc.passes.verification import Verifier

from .compiling import Lines, contents, run_infc


def test_what_an_artifact_holds(source: Path, artifact: Artifact) -> None:
    assert set(artifact.manifest.files) == {
        "captured.ir",
        "program.ir",
        "report.json",
        "tokenizer/chat_template.jinja",
        "tokenizer/tokenizer.json",
        "weights.safetensors",
    }
    manifest = artifact.manifest
    assert manifest.recipe["model"] == source.name
    assert manifest.recipe["kv_cache"]["block_size"] == 32
    assert (manifest.main.limits.step_tokens, manifest.main.limits.logit_rows) == (64, 4)
    assert manifest.target.name == "x86-64-v2"
    report = json.loads((artifact.path / "report.json").read_text())
    assert {entry["name"]: entry["matches"] for entry in report["passes"]}["lower-kv"] == 2
    assert "seconds" not in (artifact.path / "report.json").read_text()
    timings = artifact.path.with_name("small.timings.json")
    assert json.loads(timings.read_text())["capture the model"] > 0


def test_it_speaks_of_no_place_on_this_machine(source: Path, artifact: Artifact) -> None:
    for name, data in contents(artifact.path).items():
        for place in (source, artifact.path.parent, Path.home(), Path(infc.__file__).parents[2]):
            assert os.fsencode(place) + b"/" not in data, name


def test_two_compilations_give_the_same_bytes(
    source: Path, artifact: Artifact, tmp_path: Path
) -> None:
    """No cache, another directory, another hash seed, another number of threads."""
    copy = tmp_path / "elsewhere" / source.name
    shutil.copytree(source, copy)
    done = run_infc(
        *("compile", copy / "model.yaml", "-o", tmp_path / "again", "--no-cache", "-q"),
        PYTHONHASHSEED="4711",
        OMP_NUM_THREADS="2",
    )
    assert done.stderr == ""
    assert contents(tmp_path / "again") == contents(artifact.path)


class Threads(Reporter):
    """Notes how many threads torch may use when each stage begins."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: dict[str, int] = {}

    def _begin(self, name: str) -> None:
        self.threads[name] = torch.get_num_threads()


def test_torch_computes_on_one_thread(source: Path, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        threads = Threads()
        infc.compile(source / "model.yaml", tmp_path / "one", cache=False, progress=threads)
        assert threads.threads["capture the model"] == 1
        assert threads.threads["run the passes"] == 1
        assert threads.threads["emit code and weights"] == 1
        assert torch.get_num_threads() == 3  # what the caller had set
    finally:
        torch.set_num_threads(before)


def test_the_code_is_compiled_while_runs_are_compared(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    begin, check = CppBackend.begin, Verifier.check_cut

    def first(*arguments: Any) -> Any:
        order.append("code")
        return begin(*arguments)

    def second(*arguments: Any) -> Any:
        order.append("runs")
        return check(*arguments)

    monkeypatch.setattr(CppBackend, "begin", first)
    monkeypatch.setattr(Verifier, "check_cut", second)
    infc.compile(source / "model.yaml", tmp_path / "one", overrides=["backend=cpp"], cache=False)
    assert order == ["code", "runs"]  # and not once more when it is emitted


def test_the_compiler_ends_where_the_comparison_fails(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise PassError("logits are off")

    monkeypatch.setattr(Verifier, "check_cut", fail)
    with pytest.raises(PassError, match="logits are off"):
        infc.compile(source / "model.yaml", tmp_path / "one", overrides=["backend=cpp"])
    assert not any("infc-compiler" in thread.name for thread in threading.enumerate())
    assert os.listdir(tmp_path) == []


def test_a_recipe_object_and_a_checkpoint_directory(
    source: Path, artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = ["backend=reference", "runtime.step_tokens=64", "runtime.max_sequences=4"]
    overrides += ["target=x86-64-v2", "dtype=float32"]
    given = infc.compile(
        Recipe(model=str(source / "checkpoint")), tmp_path / "a", overrides=overrides
    )
    assert contents(given.path) == contents(artifact.path)
    monkeypatch.chdir(tmp_path)
    found = infc.compile(source / "checkpoint", overrides=overrides)
    assert found.path == tmp_path / f"{source.name}.infc"
    assert contents(found.path) == contents(artifact.path)


def test_dumps(source: Path, tmp_path: Path) -> None:
    infc.compile(source / "model.yaml", tmp_path / "a", verify=False, dump_ir_after="lower-kv")
    (dump,) = (tmp_path / "a.dumps").iterdir()
    assert dump.name.endswith("-lower-kv.ir")
    assert "paged_attention" in dump.read_text()
    with pytest.raises(UsageError, match="lower-kv"):
        infc.compile(source / "model.yaml", tmp_path / "b", dump_ir_after="lower-kw")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("place", ["/proc/dumps", "file/dumps"])
def test_dumps_that_cannot_be_written_are_refused_at_once(
    place: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    monkeypatch.setattr("infc.driver.compile._build", None)  # nothing was captured by then
    with pytest.raises(UsageError, match=r"cannot write the dumps: .*--dump-dir"):
        infc.compile(source / "model.yaml", "out", dump_ir_after="all", dump_dir=place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_is_recommended_and_not_built_is_said(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "mine")
    settings = '{"do_sample": true, "no_repeat_ngram_size": 3, "min_p": 0.0}'
    (tmp_path / "mine/checkpoint/generation_config.json").write_text(settings)
    progress = Lines()
    infc.compile(tmp_path / "mine", tmp_path / "a", verify=False, progress=progress)
    said = [line for line in progress.lines if "recommends" in line]
    assert said == ["the checkpoint recommends no_repeat_ngram_size 3: not supported, ignored"]


def test_templates_that_could_never_be_used_are_left_out(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "mine")
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    (tmp_path / "mine/checkpoint/chat_template.jinja").write_text(endless)
    more = tmp_path / "mine/checkpoint/additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("{% for %}")
    progress = Lines()
    made = infc.compile(tmp_path / "mine", tmp_path / "a", verify=False, progress=progress)
    assert [line for line in progress.lines if "left out" in line] == [
        "chat_template.jinja is left out: it does too much with the shortest of messages",
        "tool_use.jinja is left out: the chat template cannot be read: "
        "Expected an expression, got 'end of statement block'",
    ]
    files = made.manifest.tokenizer
    assert files is not None and files.chat_template is None and files.tool_template is None
    assert not list(made.path.rglob("*.jinja"))


@pytest.mark.parametrize("fault", ["no model", "an id far above the vocabulary"])
def test_a_tokenizer_is_refused_before_capture(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy)
    path = copy / "checkpoint/tokenizer.json"
    data = json.loads(path.read_text())
    if fault == "no model":
        del data["model"]
    else:
        data["model"]["vocab"]["zz"] = 1 << 22
    path.write_text(json.dumps(data))
    monkeypatch.setattr("infc.frontend.load._capture", lambda *_: pytest.fail("captured"))
    message = "it has no model" if fault == "no model" else "token 'zz' has the id 4194304"
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json: .*{message}"):
        infc.compile(copy, tmp_path / "out", cache=False)
    assert not (tmp_path / "out").exists()


def test_the_output_may_not_touch_the_checkpoint(source: Path) -> None:
    for place in (source, source / "checkpoint", source / "checkpoint/out"):
        with pytest.raises(
            ArtifactError, match="the output is inside the checkpoint, or contains it"
        ):
            infc.compile(source / "model.yaml", place)


def test_a_directory_has_no_revision(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="the model is a directory, which has no revision 'main'"):
        infc.compile(source / "model.yaml", tmp_path / "a", overrides=["revision=main"])
    assert os.listdir(tmp_path) == []


def test_an_output_that_is_something_else(source: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    done = run_infc("compile", source / "model.yaml", "-o", tmp_path)
    assert done.returncode == 7
    assert "refusing to replace a path that is not an infc artifact" in done.stderr.splitlines()[-1]
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_disk_full(source: Path, tmp_path: Path) -> None:
    """A limit on the size of a file stands for the disk: the weights don't fit."""
    script = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "from infc.driver.cli import run\n"
        "sys.exit(run(['compile', sys.argv[1], '-o', sys.argv[2], '-q', '--no-verify']))\n"
    )
    places = [str(source / "model.yaml"), str(tmp_path / "a")]
    command = [sys.executable, "-c", script, *places]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert done.stderr.count("\n") == 1
    assert "cannot write the artifact: File too large" in done.stderr
    assert os.listdir(tmp_path) == []


def test_an_interrupt_leaves_nothing(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "infc", "compile", str(source / "model.yaml"), "--no-cache"]
    with subprocess.Popen(
        [*command, "-o", str(tmp_path / "a")], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("load the compiler: ")
        assert any(name.startswith(".a.infc-partial-") for name in os.listdir(tmp_path))
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(timeout=60) == 130
    assert rest == "error: interrupted\n"
    assert os.listdir(tmp_path) == []
