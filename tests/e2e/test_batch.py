"""Batches: as the server answers, killed at random moments, cut off, interrupted, and wrong."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

import infc
from infc.driver.cli import run
from infc.ir.errors import InfcError
from infc.runtime.batch.bodies import row_seed
from infc.runtime.batch.run import BatchOptions, BatchResult, run_batch
from infc.runtime.executors.cpp import CppExecutor
from infc.runtime.options import RuntimeOptions
from infc.runtime.replicas.child import Child, start_engine
from infc.runtime.replicas.opening import open_front

from ..batches import BatchProcesses, write_rows

TINY = Path(__file__).resolve().parents[2] / "recipes" / "tiny"
OPTIONS = ["--threads", "1", "--kv-memory", "64MiB", "--seed", "3"]
DEADLY = 4001
KILLED_BY = f"""
import sys; sys.path[:] = sys.argv[3:]
import os, signal
from infc.runtime.executors.cpp import CppExecutor
from infc.runtime.replicas.engine_process import main
launch = CppExecutor.launch
def risky(self, step):
    if {DEADLY} in step.token_ids:
        os.kill(os.getpid(), signal.SIGSEGV)
    return launch(self, step)
CppExecutor.launch = risky
main(int(sys.argv[1]), int(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> infc.Artifact:
    """The bundled model."""
    output = tmp_path_factory.mktemp("batch") / "tiny.infc"
    return infc.compile(TINY / "model.yaml", output=output, verify=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 230 rows."""
    return write_rows(tmp_path_factory.mktemp("rows") / "in.jsonl", 200)


def batch(artifact: infc.Artifact, source: Path, output: Path, **options: Any) -> BatchResult:
    """Runs a batch in this process."""
    runtime = RuntimeOptions(threads=1, kv_memory="64MiB", **options.pop("runtime", {}))
    chosen: dict[str, Any] = {"model_names": ("tiny",), "seed": 3, **options}
    return run_batch(
        artifact,
        BatchOptions(source=source, output=output, runtime=runtime, **chosen),
        progress=False,
    )


@pytest.fixture(scope="module")
def undisturbed(
    artifact: infc.Artifact, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> bytes:
    """What one run writes."""
    output = tmp_path_factory.mktemp("undisturbed") / "out.jsonl"
    result = batch(artifact, source, output)
    assert (result.num_rows, result.num_before, result.num_failed) == (215, 0, 15)
    return output.read_bytes()


def rows_of(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in data.splitlines()]


def test_answers_are_those_of_the_model(
    artifact: infc.Artifact, source: Path, undisturbed: bytes
) -> None:
    asked = {}
    for line in source.read_text().splitlines():
        if line.startswith("{") and line != "{nonsense":
            row = json.loads(line)
            asked[row["custom_id"]] = row
    answers = {row["custom_id"]: row for row in rows_of(undisturbed) if row["response"]}
    assert answers.keys() == asked.keys()
    chosen = [f"row {number}" for number in (0, 2, 4, 1, 3, 5)]
    with infc.LLM(artifact.path, threads=1, kv_memory="64MiB") as llm:
        for custom_id in chosen:
            body, answer = asked[custom_id]["body"], answers[custom_id]["response"]
            assert answer["status_code"] == 200
            params = llm.recommended_params(
                temperature=body["temperature"],
                max_tokens=body["max_tokens"],
                seed=body.get("seed", row_seed(3, custom_id)),
                stop=tuple(body.get("stop", ())),
            )
            choice = answer["body"]["choices"][0]
            if "messages" in body:
                alone = llm.chat(body["messages"], params)
                assert choice["message"]["content"] == alone.outputs[0].text
            else:
                prompt = body["prompt"]
                (alone,) = llm.generate(prompt if isinstance(prompt, str) else prompt[0], params)
                assert choice["text"] == alone.outputs[0].text


def test_rows_that_are_wrong_have_a_line_each(undisturbed: bytes) -> None:
    rows = rows_of(undisturbed)
    first = rows[8:11]
    assert [row["error"] and row["error"]["code"] for row in first] == [
        "invalid_json",
        "duplicate_custom_id",
        None,
    ]
    assert [row["custom_id"] for row in first] == [None, "row 7", "wrong 7"]
    assert first[2]["response"]["status_code"] == 400
    assert first[2]["response"]["body"]["error"]["param"] == "n"
    assert len({row["id"] for row in rows}) == len(rows)


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.breadth)])
def test_kills_change_nothing(
    artifact: infc.Artifact, source: Path, undisturbed: bytes, tmp_path: Path, kills: int
) -> None:
    random, output, sizes = Random(kills), tmp_path / "out.jsonl", list[int]()
    with BatchProcesses(artifact.path) as processes:
        while len(sizes) < kills:
            # At any moment: as it starts, while rows are begun, and as it writes.
            size = round(len(undisturbed) * (len(sizes) + random.random() - 0.5) / kills)
            pid = processes.start(source, output)
            processes.kill(pid, output, size, random.random() * 0.03)
            if processes.wait() == 0:
                assert output.read_bytes() == undisturbed
                output.unlink()
                continue
            written = output.read_bytes() if output.exists() else b""
            assert undisturbed.startswith(written)
            sizes.append(len(written))
        processes.start(source, output)
        assert processes.wait() == 0
    assert output.read_bytes() == undisturbed
    assert len({0, len(undisturbed), *sizes}) > 2 + kills // 2, "most were killed in the middle"


def test_a_killed_engine_process_changes_nothing(
    artifact: infc.Artifact, source: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    with BatchProcesses(artifact.path, processes=2) as processes:
        pid = processes.start(source, output)
        while not output.exists() or output.stat().st_size < len(undisturbed) / 4:
            time.sleep(0.002)
        engines = children(pid)
        assert len(engines) >= 2
        os.kill(engines[0], signal.SIGKILL)
        assert processes.wait() == 0
        assert output.read_bytes() == undisturbed

        output.unlink()
        pid = processes.start(source, output)
        processes.kill(pid, output, len(undisturbed) // 2, 0)
        assert processes.wait() == signal.SIGKILL
        assert undisturbed.startswith(output.read_bytes())
    assert not any(Path(f"/proc/{engine}").exists() for engine in engines), "they end with it"
    batch(artifact, source, output, processes=1)
    assert output.read_bytes() == undisturbed


def children(pid: int) -> list[int]:
    """Processes that a process, or a thread of it, has started, the first ones first."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return sorted(int(child) for path in tasks for child in path.read_text().split())


def test_any_cut_is_mended(
    artifact: infc.Artifact, source: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    last = undisturbed.rindex(b"\n", 0, -1) + 1
    for cut, tail in ((last - 1, b""), (last, b"\0" * 5000), (last + 1, b""), (last + 60, b"\0")):
        output.write_bytes(undisturbed[:cut] + tail)
        result = batch(artifact, source, output)
        assert output.read_bytes() == undisturbed
        assert result.num_rows - result.num_before == (2 if cut < last else 1)
    assert (result.num_rows, result.num_failed) == (215, 15)


def test_neither_threads_nor_steps_change_anything(
    artifact: infc.Artifact, source: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    batch(artifact, source, output, runtime={"max_sequences": 3, "step_tokens": 37})
    assert output.read_bytes() == undisturbed


def test_an_input_may_grow(artifact: infc.Artifact, tmp_path: Path) -> None:
    grown, output = write_rows(tmp_path / "in.jsonl", 6), tmp_path / "out.jsonl"
    batch(artifact, grown, output)
    before = output.read_bytes()
    row = json.loads(grown.read_text().splitlines()[0])
    with grown.open("a") as file:
        file.write(json.dumps({**row, "custom_id": "more"}))
    assert batch(artifact, grown, output).num_before == 6
    assert output.read_bytes().startswith(before)
    assert rows_of(output.read_bytes())[6]["custom_id"] == "more"


def test_an_interrupted_batch_says_how_to_go_on(
    artifact: infc.Artifact, source: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "infc", "batch", str(artifact.path), str(source), str(output)]
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        output.unlink(missing_ok=True)
        process = subprocess.Popen([*command, *OPTIONS], stderr=subprocess.PIPE, text=True)
        while not output.exists() or output.stat().st_size < len(undisturbed) / 8:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
        assert process.returncode == status
        assert re.fullmatch(
            r"stopped: \d+ rows are in .*; the same command goes on with the others\n", said
        )
        assert output.read_bytes().endswith(b"\n")
    assert run(command[3:] + OPTIONS) == 0
    assert output.read_bytes() == undisturbed


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda place: (place / "in").unlink(), "in: cannot be read: No such file or directory"),
        (lambda place: (place / "in").write_text(" \n\n"), "in: has no rows"),
        (lambda place: (place / "out").write_text("my notes"), "out: line 1 is not of this job"),
        (lambda place: (place / "out").write_text("my notes\n"), "out: line 1 is not of this job"),
        (lambda place: (place / "out").symlink_to("no/such"), "out: cannot be written: No such"),
        (lambda place: (place / "out").symlink_to("in"), "in: is both input and output"),
        (lambda place: make_pipe(place / "in"), "in: is not a regular file"),
        (lambda place: os.mkfifo(place / "out"), "out: is not a regular file"),
        (lambda place: (place / "out").symlink_to("/dev/full"), "out: is not a regular file"),
        (lambda place: (place / "out").mkdir(), "out: is not a regular file"),
    ],
)
def test_files_that_cannot_be_used_are_one_line(
    artifact: infc.Artifact,
    tmp_path: Path,
    spoil: Callable[[Path], Any],
    expected: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    used, output = write_rows(tmp_path / "in", 3), tmp_path / "out"
    spoil(tmp_path)
    before = output.read_bytes() if output.is_file() else None
    assert run(["batch", str(artifact.path), str(used), str(output), *OPTIONS]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert before is None or output.read_bytes() == before


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def test_an_output_of_another_job_is_kept(
    artifact: infc.Artifact, source: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_bytes(undisturbed)
    changed = tmp_path / "in.jsonl"
    lines = source.read_bytes().splitlines(keepends=True)
    changed.write_bytes(b"".join([*lines[:2], lines[2].replace(b"def", b"class"), *lines[3:]]))
    with pytest.raises(InfcError, match="line 3 is not of this job"):
        batch(artifact, changed, output)
    shorter = tmp_path / "short.jsonl"
    shorter.write_bytes(b"".join(lines[:2]))
    with pytest.raises(InfcError, match="line 3 is not of this job"):
        batch(artifact, shorter, output)
    for options in ({"seed": 4}, {"model_names": ("other",)}, {"runtime": {"max_context": 200}}):
        with pytest.raises(InfcError, match="line 1 is not of this job"):
            batch(artifact, source, output, **options)
    assert output.read_bytes() == undisturbed


def test_one_process_writes_an_output(
    artifact: infc.Artifact, source: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    with output.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InfcError, match="another process is writing this file"):
            batch(artifact, source, output)


def test_a_full_disk_is_one_line(
    artifact: infc.Artifact, source: Path, undisturbed: bytes, tmp_path: Path
) -> None:
    script = "import resource, sys; from infc.driver.cli import run; import signal\n"
    script += "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    script += "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); run(sys.argv[1:])"
    output = tmp_path / "out.jsonl"
    arguments = ["batch", str(artifact.path), str(source), str(output), *OPTIONS]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], stderr=subprocess.PIPE, text=True
    )
    assert done.stderr == f"error: {output}: cannot be written: File too large\n"
    assert len(output.read_bytes()) == 20000
    batch(artifact, source, output)
    assert output.read_bytes() == undisturbed


def test_a_row_whose_step_fails_fails_alone(
    artifact: infc.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch, attempts = CppExecutor.launch, 0

    def risky(self: CppExecutor, step: Any) -> Any:
        nonlocal attempts
        if DEADLY in step.token_ids:
            attempts += 1
            raise InfcError("no such luck")
        return launch(self, step)

    source, calm, output = write_risky(tmp_path / "in"), tmp_path / "calm", tmp_path / "out"
    batch(artifact, source, calm)
    monkeypatch.setattr(CppExecutor, "launch", risky)
    assert batch(artifact, source, output).num_failed == 1
    check_fifth(output, calm, "the step that this answer was in failed")
    assert attempts == 3


def test_a_row_that_kills_engines_fails_alone(
    artifact: infc.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, calm, output = write_risky(tmp_path / "in"), tmp_path / "calm", tmp_path / "out"
    batch(artifact, source, calm)
    starts = []

    def start() -> Child:
        starts.append(time.monotonic())
        return start_engine(KILLED_BY)

    assert open_front.__kwdefaults__ is not None
    monkeypatch.setitem(open_front.__kwdefaults__, "start", start)
    assert batch(artifact, source, output, processes=2).num_failed == 1
    check_fifth(output, calm, "engine")
    assert len(starts) < 10, "it is given to few engines"


def write_risky(path: Path) -> Path:
    """Rows of which the fifth has a token that something happens at."""
    rows: list[dict[str, Any]] = []
    for number in range(40):
        prompt = [DEADLY] if number == 5 else [number + 300, 17]
        body = {"model": "tiny", "prompt": prompt, "banned_token_ids": [DEADLY], "max_tokens": 9}
        row = {"custom_id": str(number), "method": "POST", "url": "/v1/completions", "body": body}
        rows.append(row)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def check_fifth(output: Path, calm: Path, reason: str) -> None:
    """It alone has no answer."""
    answers, expected = rows_of(output.read_bytes()), rows_of(calm.read_bytes())
    assert answers[5]["response"]["status_code"] == 500
    error = answers[5]["response"]["body"]["error"]
    assert error["code"] == "generation_failed"
    assert reason in error["message"]
    del answers[5], expected[5]
    assert answers == expected


def test_an_engine_that_stops_ends_the_batch(
    artifact: infc.Artifact, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(self: CppExecutor, step: Any) -> Any:
        raise SystemError("no engine")

    output = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(CppExecutor, "launch", stopping)
        with pytest.raises(InfcError, match="the engine has stopped"):
            batch(artifact, source, output)
    assert output.read_bytes() == b""


def test_a_terminal_shows_progress(artifact: infc.Artifact, tmp_path: Path) -> None:
    source, output = write_rows(tmp_path / "in.jsonl", 5), tmp_path / "out.jsonl"
    command = f"{sys.executable} -m infc batch {artifact.path} {source} {output}"
    script = shutil.which("script")
    if script is None:
        pytest.skip("no program `script` to make a terminal")
    done = subprocess.run(
        [script, "-qec", command, "/dev/null"], capture_output=True, text=True, timeout=60
    )
    assert "rows" in done.stdout
    assert "5/5" in done.stdout
    assert len(rows_of(output.read_bytes())) == 5
