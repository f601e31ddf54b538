"""Compilation: the same bytes everywhere, again from the cache, and nothing left behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import infc
from infc.codegen.cpp.backend import CppBackend
from infc.driver.cache import ArtifactCache
from infc.driver.cli import run
from infc.driver.progress import Reporter
from infc.driver.recipe import Recipe
from infc.ir.artifact import Artifact, open_artifact
from infc.ir.errors import ArtifactError, PassError, RecipeError, UsageError
from infc.passes.verification import Verifier

from ..checkpoints import make_checkpoint

RECIPE = """
model: ./checkpoint
dtype: float32
backend: reference
target: x86-64-v2
runtime: {step_tokens: 64, max_sequences: 4}
"""


class Lines(Reporter):
    """Keeps the remarks."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def remark(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe beside a small checkpoint."""
    place = tmp_path_factory.mktemp("source")
    make_checkpoint("llama", place / "checkpoint", tokenizer=True, num_hidden_layers=2)
    (place / "model.yaml").write_text(RECIPE)
    return place


@pytest.fixture(scope="module")
def artifact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    output = tmp_path_factory.mktemp("out") / "small"
    return infc.compile(source / "model.yaml", output, cache=False)


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def run_infc(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "infc", *map(str, arguments)],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


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
    assert (manifest.limits.step_tokens, manifest.limits.logit_rows) == (64, 4)
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


def test_again_from_the_cache(source: Path, tmp_path: Path) -> None:
    progress = Lines()
    first = infc.compile(source / "model.yaml", tmp_path / "one", verify=False, progress=progress)
    assert progress.lines == [line for line in progress.lines if "cache" not in line]
    progress = Lines()
    start = time.perf_counter()
    second = infc.compile(source / "model.yaml", tmp_path / "two", verify=False, progress=progress)
    assert time.perf_counter() - start < 1
    assert progress.lines == [f"{tmp_path / 'two'}: from the cache, which had the same compilation"]
    assert contents(first.path) == contents(second.path)
    # Whatever goes in makes another artifact.
    progress = Lines()
    changed = ["runtime.max_sequences=3"]
    third = infc.compile(
        source / "model.yaml", tmp_path / "two", overrides=changed, verify=False, progress=progress
    )
    assert progress.lines == [line for line in progress.lines if "cache" not in line]
    assert third.manifest.limits.max_sequences == 3


def test_a_second_compilation_imports_no_torch(source: Path, tmp_path: Path) -> None:
    infc.compile(source / "model.yaml", tmp_path / "one", verify=False)
    script = (
        "import sys, infc; infc.compile(sys.argv[1], sys.argv[2], verify=False);"
        "print(*{'torch', 'transformers'} & set(sys.modules))"
    )
    places = [str(source / "model.yaml"), str(tmp_path / "two")]
    command = [sys.executable, "-c", script, *places]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_damaged_cache_costs_a_compilation(source: Path, tmp_path: Path, own_cache: Path) -> None:
    first = infc.compile(source / "model.yaml", tmp_path / "one", verify=False)
    good = contents(first.path)
    (kept,) = (own_cache / "artifacts").iterdir()
    weights = kept / "weights.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.unlink()  # not through a hard link into the first artifact
    weights.write_bytes(damaged)
    second = infc.compile(source / "model.yaml", tmp_path / "two", verify=False)
    assert contents(second.path) == good


def test_a_cache_cleared_meanwhile_costs_a_compilation(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infc.compile(source / "model.yaml", tmp_path / "a", verify=False)
    find = ArtifactCache.find

    def find_and_lose(cache: ArtifactCache, key: str, on_remark: object) -> Artifact | None:
        found = find(cache, key)
        assert found is not None
        cache.clear()
        return found

    monkeypatch.setattr(ArtifactCache, "find", find_and_lose)
    infc.compile(source / "model.yaml", tmp_path / "b", verify=False)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


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


def test_a_pass_of_ones_own(source: Path, tmp_path: Path) -> None:
    """Found beside the recipe, run, reported, and never taken from the cache."""
    shutil.copytree(source, tmp_path / "mine")
    (tmp_path / "mine/my_passes_for_a_test.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import ClassVar\n"
        "from infc.passes.base import Pass, PassResult\n\n"
        "@dataclass(frozen=True)\n"
        "class CountNodes(Pass):\n"
        "    name: ClassVar[str] = 'count-nodes'\n"
        "    phase: ClassVar[str] = 'fuse'\n\n"
        "    def run(self, program, context):\n"
        "        return PassResult(program, near_misses=(str(len(program.nodes)),))\n"
    )
    progress = Lines()
    made = infc.compile(
        tmp_path / "mine/model.yaml",
        tmp_path / "a",
        overrides=["passes={'my_passes_for_a_test:CountNodes': {after: fuse-rope}}"],
        verify=False,
        progress=progress,
    )
    assert any("not cached: the recipe brings a pass of its own" in x for x in progress.lines)
    (idle,) = (line for line in progress.lines if "matched nothing" in line)
    assert re.fullmatch(r"count-nodes matched nothing \(near misses: \d+\)", idle)
    names = [e["name"] for e in json.loads((made.path / "report.json").read_text())["passes"]]
    assert names.index("count-nodes") == names.index("fuse-rope") + 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["passes={fuse-rpe: false}"], "no pass fuse-rpe .did you mean fuse-rope"),
        (["passes={fuse-rope: {colour: red}}"], "pass fuse-rope has no option colour"),
        (["passes={'nowhere:Pass': true}"], "cannot import nowhere"),
    ],
)
def test_passes_that_cannot_be(
    source: Path, tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        infc.compile(source / "model.yaml", tmp_path / "a", overrides=overrides)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("passes", "line", "message"),
    [
        ("\n  fuse-rope: true\n  fuse-rpe: false", 9, "no pass fuse-rpe"),
        ("\n  fuse-rope: {colour: red}", 8, "has no option colour"),
        ("\n  - merge-qkv\n  - gone_from_everywhere:Pass: {before: fuse-rope}", 9, "cannot import"),
        ("\n  fuse-rope: {before: fuse-rpe}", 8, "no pass fuse-rpe"),
        ("\n  squeeze-unit-batch: false", 7, "requires unit-batch-squeezed"),
        ("fuse-rope,fuse-rpe", 7, "unknown pass fuse-rpe"),
        ("\n  - merge-qkv\n  - 7", 9, "expected a name or a mapping"),
    ],
)
def test_errors_about_passes_say_the_line(
    source: Path, tmp_path: Path, passes: str, line: int, message: str
) -> None:
    recipe = tmp_path / "model.yaml"
    recipe.write_text(f"{RECIPE}passes: {passes}\nmodel: {source / 'checkpoint'}\n")
    recipe.write_text(recipe.read_text().replace("model: ./checkpoint\n", "\n"))
    with pytest.raises(UsageError, match=message) as caught:
        infc.compile(recipe, tmp_path / "a")
    assert caught.value.where == f"{recipe}:{line}"


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


@pytest.fixture(scope="module")
def fast(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The same model by the cpp backend, for this machine."""
    output = tmp_path_factory.mktemp("cpp") / "fast"
    overrides = ["backend=cpp", "target=native"]
    return infc.compile(source / "model.yaml", output, overrides=overrides, cache=False)


def test_the_cpp_backend(fast: Artifact) -> None:
    assert fast.manifest.entry.kind == "cpp-shared-library"
    assert open_artifact(fast.path, "full").identity == fast.identity
    for name, data in contents(fast.path).items():
        assert os.fsencode(fast.path.parent) not in data, name


def test_generating_loads_no_torch(fast: Artifact) -> None:
    script = (
        "import sys; from infc.driver.cli import run\n"
        "assert run(['generate', sys.argv[1], 'def', '--max-tokens', '8', '--ignore-eos']) == 0\n"
        "print(*{'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, str(fast.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    stats, heavy = done.stderr.splitlines()
    assert stats.startswith("4 prompt tokens, 8 tokens, ")
    assert heavy == ""


def test_a_prompt_of_token_ids_is_the_text(
    fast: Artifact, capfd: pytest.CaptureFixture[str]
) -> None:
    common = ["--max-tokens", "8", "--ignore-eos", "--no-stats"]
    assert run(["generate", str(fast.path), "def", *common]) == 0
    text = capfd.readouterr().out
    tokens = infc.LLM(fast).engine.encode("def")
    given = ",".join(map(str, tokens))
    assert run(["generate", str(fast.path), "--token-ids", given, *common]) == 0
    assert capfd.readouterr().out == text


def test_a_conversation_through_a_pipe(fast: Artifact) -> None:
    command = [sys.executable, "-m", "infc", "chat", str(fast.path), "--max-tokens", "4"]
    said = "one\n/reset\n\none\n/exit\nnever read\n"
    done = subprocess.run(
        [*command, "--ignore-eos"], input=said.encode(), capture_output=True, check=True
    )
    first, second = done.stdout[: len(done.stdout) // 2], done.stdout[len(done.stdout) // 2 :]
    assert first == second != b""  # /reset forgot the first, so the second is answered alike
    assert done.stderr == b"[new chat]\n"
    block = fast.manifest.kv.groups[0].bytes_per_block()
    tight = subprocess.run(
        [*command, "--kv-memory", str(4 * block)], input=b"/exit\n", capture_output=True, check=True
    )
    assert tight.stderr.startswith(b"note: max_context is "), "less than was compiled is said"


def test_a_conversation_that_fills_the_context_goes_on(fast: Artifact) -> None:
    command = [sys.executable, "-m", "infc", "chat", str(fast.path), "--max-tokens", "4"]
    said = "/help\n" + "one two\n" * 9
    done = subprocess.run(
        [*command, "--ignore-eos", "--max-context", "96"], input=said.encode(), capture_output=True
    )
    assert done.returncode == 0
    help_line, note = done.stderr.decode().splitlines()
    assert help_line == "/reset starts a new chat, /exit or Ctrl-D ends it"
    assert note == "note: the context is full, so the oldest turns are dropped"
    assert done.stdout.count(b"\n") >= 9


def test_a_prompt_that_leaves_less_than_the_default_length_is_answered(
    fast: Artifact, capfd: pytest.CaptureFixture[str]
) -> None:
    few = [str(fast.path), "--token-ids", "5,6,7", "--max-context", "8", "--ignore-eos"]
    assert run(["generate", *few]) == 0
    assert "3 prompt tokens, 5 tokens, " in capfd.readouterr().err
    assert run(["generate", *few, "-n", "2"]) == 0
    assert "note: with temperature 0 all answers are the same" in capfd.readouterr().err
    assert run(["generate", *few, "--max-tokens", "6"]) == 2
    assert "use at most 5" in capfd.readouterr().err


def test_evaluating(fast: Artifact, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("the quick brown fox " * 20)
    options = ["--context", "64", "--stride", "32", "--json"]
    assert run(["eval", str(fast.path), str(tmp_path / "text"), *options]) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["num_bytes"] == 400
    assert result["num_predicted"] == result["num_tokens"] - 1 == 400
    assert result["perplexity"] > 1
    for bad in ("--context", "--stride"):
        assert run(["eval", str(fast.path), str(tmp_path / "text"), bad, "0"]) == 2
        error = capfd.readouterr().err
        assert error.startswith("error: a context of ")
        assert "tokens do not fit (context is 2.." in error


def test_evaluation_is_that_of_transformers(source: Path, fast: Artifact) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from infc.driver.evaluate import evaluate_text

    text = "Whoever reads this, reads it in chunks of a few rows of logits."
    result = evaluate_text(fast, text)
    tokens = infc.LLM(fast).engine.encode(text)
    model = AutoModelForCausalLM.from_pretrained(source / "checkpoint", dtype=torch.float32)
    with torch.inference_mode():
        log_p = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), dim=-1)
    nats = -sum(float(log_p[at - 1, tokens[at]]) for at in range(1, len(tokens)))
    assert result.nats == pytest.approx(nats, rel=1e-5)


def test_an_interrupt_while_generating(artifact: Artifact) -> None:
    """With the slow backend, so that the interrupt comes long before the end."""
    command = [sys.executable, "-m", "infc", "generate", str(artifact.path), "x", "--ignore-eos"]
    with subprocess.Popen(
        [*command, "--max-tokens", "120"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == b"error: interrupted\n"
        assert process.wait(timeout=60) == 130
