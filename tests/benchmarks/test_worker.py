"""Workers of the comparison: what goes over the pipe, and that a stopped one does nothing."""

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.peers.client import REPOSITORY, Worker, WorkerError
from benchmarks.peers.engines import OnTokens
from benchmarks.peers.process import cpu_seconds, peak_rss_bytes
from benchmarks.peers.worker import serve
from benchmarks.peers.workloads import Request

from ..runtime.small_artifact import write_small_artifact
from .scripted import SPINNING, script, spinning

TWO = Request(((1, 2, 3), (1, 2, 4)), 2, 2)


class Halves:
    """An engine that gives its tokens in two parts, or is short of one."""

    version = "1.2"

    def __init__(self, missing: int = 0) -> None:
        self._missing = missing

    def generate(self, request: Request, on_tokens: OnTokens) -> None:
        on_tokens(0)  # nothing yet
        on_tokens(1)
        on_tokens(request.new_tokens - 1 - self._missing)


def replies(engine: Halves, *requests: Request) -> list[dict[str, object]]:
    out = io.StringIO()
    serve(engine, iter([json.dumps(r.to_json()) for r in requests]), out)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_each_request_gets_one_line_after_the_version() -> None:
    version, one, other = replies(Halves(), TWO, TWO)
    assert version == {"version": "1.2"}
    for reply in (one, other):
        assert reply["tokens"] == 4
        first, seconds = reply["first"], reply["seconds"]
        assert isinstance(first, float)
        assert isinstance(seconds, float)
        assert 0 < first <= seconds
        assert isinstance(reply["peak_rss_bytes"], int)


def test_peak_of_memory_outlasts_it_and_counts_descendants() -> None:
    child = "x = bytearray(64 << 20); del x; print('freed', flush=True); input()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert peak_rss_bytes(process.pid) > 64 << 20
        process.communicate(b"\n")


def test_too_few_tokens_are_an_error_and_not_a_figure() -> None:
    _, reply = replies(Halves(missing=1), TWO)
    assert reply["error"] == "RuntimeError: 3 tokens came, and 4 were asked for"


def test_infc_answers_as_a_contestant(tmp_path: Path) -> None:
    artifact = write_small_artifact(tmp_path / "small.infc")
    command = [sys.executable, "-m", "benchmarks.peers.worker", "infc_llm", str(artifact), "1"]
    with Worker(command, {}, tmp_path / "log") as worker:
        worker.loaded()
        reply = worker.ask(Request(((3, 4, 5), (6, 7), (3, 4)), 5, 2))
        assert (reply.tokens, reply.peak_rss_bytes > 1 << 20) == (15, True)
        with pytest.raises(WorkerError, match="RequestError"):
            worker.ask(Request(((10**6,),), 1))
        assert worker.ask(Request(((3, 4, 5),), 5)).tokens == 5


def test_stopped_worker_uses_no_cpu_though_it_spins(tmp_path: Path) -> None:
    with spinning(tmp_path / "log") as worker:
        worker.loaded()
        worker.pause()
        before = cpu_seconds(worker.pid)
        time.sleep(0.3)
        assert cpu_seconds(worker.pid) == before
        worker.resume()
        assert worker.ask(TWO).tokens == 4
        while cpu_seconds(worker.pid) <= before:  # it does spin: the stop is what kept it
            time.sleep(0.01)


def test_times_from_the_start_count_the_loading(tmp_path: Path) -> None:
    slow = "import time; time.sleep(0.3)\n" + SPINNING.replace("LIMIT", "None")
    with script(slow, tmp_path / "log") as worker:
        reply = worker.ask_from_start(TWO)
    assert reply.seconds >= 0.3
    assert reply.seconds - reply.first == pytest.approx(0.5)  # as the worker said


def test_death_is_told_with_the_last_words(tmp_path: Path) -> None:
    with (
        script("raise SystemExit('no such model')", tmp_path / "log") as worker,
        pytest.raises(WorkerError, match=r"status 1; .* no such model"),
    ):
        worker.loaded()
    assert not worker.is_alive


def test_silence_ends_the_worker(tmp_path: Path) -> None:
    with script("import time; time.sleep(60)", tmp_path / "log", 0.1) as worker:
        with pytest.raises(WorkerError, match="no answer"):
            worker.loaded()
        assert not worker.is_alive


def test_worker_ends_with_its_parent_even_stopped(tmp_path: Path) -> None:
    artifact = write_small_artifact(tmp_path / "small.infc")
    parent = f"""
import sys, time
from pathlib import Path
from benchmarks.peers.client import Worker
words = [sys.executable, "-m", "benchmarks.peers.worker", "infc_llm", {str(artifact)!r}, "1"]
worker = Worker(words, {{}}, Path({str(tmp_path / "log")!r}))
worker.loaded()
worker.pause()
print(worker.pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen(
        [sys.executable, "-c", parent], cwd=REPOSITORY, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"  # nobody may be there to wait for it
