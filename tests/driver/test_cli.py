"""The command line: one line and a status for every failure, and nothing heavy before a command."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infc.driver import cli
from infc.driver.cli import _COMMANDS, run
from infc.runtime.options import MAX_THREADS

from ..ir.artifacts import write_artifact


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Status and the one line of error of a command that must fail."""
    status = run(arguments)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("\n")
    return status, captured.err.removeprefix("error: ").rstrip("\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import infc

    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"infc {infc.__version__}\n"


def test_long_names_do_not_make_long_errors(capsys: pytest.CaptureFixture[str]) -> None:
    _, line = refused(capsys, "inspect", "a" * 100_000)
    assert len(line) < 3000


@pytest.mark.parametrize("ids", ["", ",", "1,,2", "1,x", "1, ,2"])
def test_token_ids_are_numbers(ids: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = refused(capsys, "generate", "nothing.infc", "--token-ids", ids)
    assert (status, "takes numbers such as 1,2,3" in line) == (2, True)


@pytest.mark.parametrize("name", ["", *_COMMANDS])
def test_help_shows_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*([name] if name else []), "--help"]) == 0
    text = capsys.readouterr().out
    assert f"    infc {name}".rstrip() in text


def test_threads_are_the_same_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("run", "generate", "chat", "serve", "eval", "bench"):
        for threads in ("0", str(MAX_THREADS + 1)):
            status, line = refused(capsys, name, "x", "x", "--threads", threads)
            assert (status, f"{threads} is not in the range 1<=x<=1024" in line) == (2, True), name


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert "Commands:" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from infc.driver.cli import run\n"
        f"for name in {list(_COMMANDS)!r}: run([name, '--help'])\n"
        "run(['--help'])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'rich'} & set(sys.modules)\n"
        "print(*heavy, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.split() == []


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["compil", "x"], 2, "no command 'compil' (did you mean 'compile'?)"),
        (["compile"], 2, "missing argument 'RECIPE'"),
        (["compile", "--frobnicate", "x"], 2, "no such option"),
        (["compile", "gone.yaml"], 2, "gone.yaml: no such file"),
        (["compile", "Qwen/Qwen2-0.5B"], 3, "the hub does not provide 'Qwen/Qwen2-0.5B'"),
        (["compile", "tinny"], 2, "tinny: no such file, directory or bundled recipe (did you mean"),
        (["compile", "recipes/gone.yaml"], 2, "recipes/gone.yaml: no such file"),
        (["compile", "gone.gguf"], 2, "gone.gguf: no such file, directory or bundled recipe"),
        (["compile", "pytorch_model.bin"], 2, "pytorch_model.bin: this is not a recipe"),
        (["compile", "good.yaml", "--set", "model=gone.gguf"], 3, "gone.gguf: no such GGUF file"),
        (["compile", "config.json"], 2, "config.json: this is not a recipe"),
        (["compile", "bad.yaml"], 2, "bad.yaml:2: unknown key 'bakend'"),
        (["compile", "good.yaml", "--set", "target=z80"], 6, "unknown target 'z80'"),
        (["compile", "good.yaml"], 3, "checkpoint: no such model directory"),
        (["compile", "remote.yaml"], 3, "the hub does not provide 'nobody/nothing'"),
        (["compile", "good.yaml", "--set", "model=good.yaml"], 3, "the model is a file"),
        (["generate", "nowhere.infc", "x"], 7, "nowhere.infc: the artifact does not exist"),
        (["run", "nowhere", "x"], 2, "nowhere: no such file, directory or bundled recipe"),
        (
            ["run", "empty", "x"],
            2,
            "empty: this directory contains neither a model.yaml nor the config.json",
        ),
        (["serve", "bad.yaml"], 2, "bad.yaml:2: unknown key 'bakend'"),
        (["bench", "remote.yaml"], 3, "the hub does not provide 'nobody/nothing'"),
        (["run", "art", "x", "--set", "dtype=float32"], 2, "this is a compiled artifact"),
        (["inspect", "corrupt"], 7, "its 5120 bytes do not match their digest"),
        (
            ["generate", "version3", "x"],
            7,
            "made by a newer infc (0.1.0): its format has version 3",
        ),
        (["generate", "art", "x", "--token-ids", "1"], 2, "--token-ids cannot be combined"),
        (["generate", "art", "--token-ids", "one"], 2, "takes numbers such as 1,2,3"),
        (["generate", "art", "x", "--temperature", "nan"], 2, "temperature"),
        (["generate", "art", "x", "--top-p", "2"], 2, "top_p"),
        (["generate", "art", "x", "--temperature", "hot"], 2, "not a valid float"),
        (["inspect", "art", "--verify", "maybe"], 2, "invalid value for '--verify'"),
        (["inspect", "."], 7, "no manifest.json here: not an infc artifact"),
        (["eval", "art", "gone.txt"], 2, "gone.txt: cannot be read: No such file"),
        (["opt", "gone.ir", "-p", "x"], 2, "gone.ir: cannot be read"),
        (["passes", "fuse-rms-nrm"], 2, "fuse-rms-norm"),
        (["serve", "art", "--port", "99999"], 2, "invalid value for '--port'"),
        (["bench", "art", "--batch", "0"], 2, "invalid value for '--batch'"),
        (["recipe", "show", "bad.yaml"], 2, "bad.yaml:2: unknown key"),
    ],
)
def test_bad_input_is_one_line_and_a_status(
    arguments: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "good.yaml").write_text("model: ./checkpoint\n")
    (tmp_path / "remote.yaml").write_text("model: nobody/nothing\n")
    (tmp_path / "bad.yaml").write_text("model: x\nbakend: cpp\n")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "empty").mkdir()
    write_artifact(tmp_path / "art")
    weights = write_artifact(tmp_path / "corrupt") / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[::-1])
    manifest = write_artifact(tmp_path / "version3") / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 2', '"version": 3'))
    before = sorted(os.listdir(tmp_path))
    assert refused(capsys, *arguments)[0] == status
    assert run(arguments) == status
    assert message in " ".join(capsys.readouterr().err.split())
    assert sorted(os.listdir(tmp_path)) == before


def test_an_artifact_for_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : cx16 lahf_lm popcnt pni ssse3 sse4_1\n")
    monkeypatch.setattr("infc.ir.targets.x86._CPUINFO", cpuinfo)
    status, line = refused(capsys, "generate", str(write_artifact(tmp_path / "a")), "x")
    assert status == 6
    assert "this machine lacks sse4.2" in line


def test_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from infc.codegen.cpp.toolchain import find_toolchain

    (tmp_path / "model.yaml").write_text("model: .\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    find_toolchain.cache_clear()
    status, line = refused(capsys, "compile", str(tmp_path / "model.yaml"))
    find_toolchain.cache_clear()
    assert status == 5
    assert "no C++ compiler was found" in line
    assert "apt-get install" in line


def test_a_fault_of_our_own_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise ValueError("two\nlines")

    monkeypatch.setattr("infc.driver.doctor.examine", broken)
    status, line = refused(capsys, "doctor")
    assert status == 1
    assert "a fault in infc itself: ValueError: two lines" in line
    monkeypatch.setenv("INFC_DEBUG", "1")
    with pytest.raises(ValueError, match="two"):
        run(["doctor"])


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("infc.driver.doctor.examine", interrupt)
    assert refused(capsys, "doctor") == (130, "interrupted")


def doctor_with(body: str, place: Path) -> tuple[int, str]:
    """Status and stderr of `infc doctor` that examines by this text, in a process of its own."""
    (place / "examined.py").write_text(
        "import os\nfrom infc.driver import cli, doctor\n"
        f"def examine(*_, **__):\n{body}doctor.examine = examine\ncli.main()\n"
    )
    command = [sys.executable, "-m", "examined", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place)
    return done.returncode, done.stderr


def test_interrupted_in_text_that_a_library_executes(tmp_path: Path) -> None:
    """Such an interrupt made CPython end `python -m` by the signal, after all had been said."""
    body = "    exec('raise KeyboardInterrupt')\n"
    assert doctor_with(body, tmp_path) == (130, "error: interrupted\n")


@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")]
)
def test_stopped_in_a_library_that_makes_it_an_error_of_its_own(
    number: signal.Signals, said: str, tmp_path: Path
) -> None:
    """As pydantic does while it builds a schema: what stops it is text in a SchemaError then."""
    body = (
        "    try:\n"
        f"        os.kill(os.getpid(), {int(number)})\n"
        "    except BaseException as error:\n"
        "        raise ValueError(f'not built: {error!r}') from None\n"
    )
    assert doctor_with(body, tmp_path) == (128 + number, f"error: {said}\n")


def test_a_stop_that_a_chat_handled_is_not_told_of_a_later_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from infc.driver import conversation, stop_signals

    def stopped(_: str) -> str:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError

    monkeypatch.setattr("builtins.input", stopped)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        stop_signals.raise_stop_signals()
        assert conversation._read_line() == ""
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
    assert stop_signals.stopped_by() is None


def infc(*arguments: str, **options: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "infc", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, **pipes)  # type: ignore[call-overload,no-any-return]


def test_a_reader_that_has_enough() -> None:
    process = infc("recipe", "schema")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() in (0, 141)


def test_cache_commands(
    tmp_path: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from infc.driver.cache import ArtifactCache
    from infc.ir.artifact import open_artifact

    ArtifactCache().add("k", open_artifact(write_artifact(tmp_path / "a")))
    assert run(["cache", "path"]) == 0
    assert capsys.readouterr().out.strip() == str(own_cache)
    assert run(["cache", "size"]) == 0
    assert capsys.readouterr().out == "1 artifact, 0.0 MB of at most 20.00 GB\n"
    assert run(["cache", "clear"]) == 0
    assert capsys.readouterr().out == "removed 1 artifact, 0.0 MB\n"


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write_artifact(tmp_path / "a"))
    assert run(["inspect", path]) == 0
    text = capsys.readouterr().out
    for part in ("toy, 0.0 M parameters", "x86-64-v2", "64 tokens", "kv full", "max_context  64"):
        assert part in text
    assert run(["inspect", path, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["manifest"]["model"]["architecture"] == "toy"
    assert document["program"] is None


PROGRAM = """program "small" phase captured {
  symbol T: 1..8
  input %positions: i64[T]
  %a = cast(%positions) {dtype = "f32"} : f32[T]
  %b = neg(%a) : f32[T]
  %c = neg(%a) : f32[T]
  output %c
}
"""


def test_opt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.ir").write_text(PROGRAM)
    assert run(["opt", str(tmp_path / "a.ir"), "-p", "eliminate-dead-code"]) == 0
    text = capsys.readouterr().out
    assert text.count("neg(") == 1
    out = str(tmp_path / "b.ir")
    assert run(["opt", str(tmp_path / "a.ir"), "-p", "eliminate-dead-code", "-o", out]) == 0
    assert (tmp_path / "b.ir").read_text() == text
    out = str(tmp_path / "a.ir" / "c.ir")
    status, line = refused(
        capsys, "opt", str(tmp_path / "a.ir"), "-p", "eliminate-dead-code", "-o", out
    )
    assert status == 2
    assert line.startswith(f"{out}: cannot be written: ")


def test_opt_points_at_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.ir").write_text(PROGRAM.replace("neg(%a)", "neg(%z)", 1))
    status, line = refused(capsys, "opt", str(tmp_path / "a.ir"), "-p", "eliminate-dead-code")
    assert status == 4
    assert "%z" in line
    (tmp_path / "a.ir").write_text(PROGRAM.replace("output", "outpt"))
    status, line = refused(capsys, "opt", str(tmp_path / "a.ir"), "-p", "eliminate-dead-code")
    assert status == 4
    assert "a.ir:7:3: " in line
    (tmp_path / "a.ir").write_text(PROGRAM)
    status, line = refused(capsys, "opt", str(tmp_path / "a.ir"), "-p", "eliminate-ded-code")
    assert status == 2
    assert "eliminate-dead-code" in line


def test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["passes"]) == 0
    text = capsys.readouterr().out
    for phase in (
        "canonicalize",
        "shard (no pass yet)",
        "fuse",
        "lower-kv",
        "plan (of the backend cpp)",
    ):
        assert f"{phase}\n" in text
    assert run(["passes", "lower-kv"]) == 0
    text = capsys.readouterr().out
    assert "option    block_size = 32 (int)" in text
    assert "numbers   reassociates" in text


def test_a_pass_beside_is_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "beside_here.py").write_text(
        "from infc import ops, rewrite\n"
        "Twice = rewrite('twice', lambda x: ops.neg(ops.neg(x)), lambda x: x)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert run(["passes", "beside_here:Twice"]) == 0
    assert capsys.readouterr().out.startswith("twice\n")
    status, line = refused(capsys, "passes", "gone_from_here:Twice")
    assert (status, "put it beside the recipe or into the working dir" in line) == (2, True)


def test_recipe_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.yaml").write_text("model: x\n")
    assert run(["recipe", "show", str(tmp_path / "model.yaml"), "--set", "dtype=float32"]) == 0
    assert "dtype: float32\n" in capsys.readouterr().out


def test_a_termination_removes_what_is_half_written(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        "from infc.driver.stop_signals import raise_stop_signals\n"
        "from infc.ir.artifact import ArtifactWriter\n"
        "raise_stop_signals()\n"
        "with ArtifactWriter(sys.argv[1]) as writer:\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert os.listdir(tmp_path) == []


def test_the_command_list_is_what_the_folder_holds() -> None:
    folder = Path(cli.__file__).parent / "commands"
    assert {path.stem for path in folder.glob("[!_]*.py")} == set(_COMMANDS)


def test_seconds_since_process_start() -> None:
    from infc.driver.generate import seconds_since_process_start

    start = seconds_since_process_start()
    time.sleep(0.05)
    assert 0.03 < seconds_since_process_start() - start < 5
