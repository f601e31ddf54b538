"""The log never blocks, raises or forges: stderr may be full, closed, or read by nobody."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from infc.runtime.log import ServerLog, printable
from infc.runtime.log_writer import LogWriter

from ..small_artifact import write_small_artifact
from .test_stderr import BODY, served, stop


@contextlib.contextmanager
def stderr_of(descriptor: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets `sys.stderr` be a file."""
    with os.fdopen(descriptor, "w") as file:
        monkeypatch.setattr(sys, "stderr", file)
        yield


@pytest.mark.parametrize("redirect", ["2>/dev/full", "2>&-", "2>&1 | sleep 30"])
def test_a_server_whose_log_goes_nowhere(tmp_path: Path, redirect: str) -> None:
    small, ready = write_small_artifact(tmp_path / "small"), tmp_path / "ready"
    options = "--port 0 --log-requests --model-name small"
    command = f"exec {sys.executable} -m infc serve {small} {options}"
    if "|" in redirect:  # a pipe that nobody reads; stdout goes elsewhere
        command = f"{{ {sys.executable} -m infc serve {small} {options} 2>&1 >{ready} & echo $!; }}"
        command = f"{command} | {{ read pid; echo $pid >{ready}.pid; sleep 30; }}"
    else:
        command = f"echo $$ >{ready}.pid; {command} >{ready} {redirect}"
    with subprocess.Popen(["bash", "-c", command]) as popen:
        deadline = time.monotonic() + 60
        while not ready.exists() or not ready.read_text().endswith("\n"):
            assert time.monotonic() < deadline and popen.poll() is None
            time.sleep(0.05)
        url = ready.read_text().split()[3].removesuffix("/v1")
        with httpx.Client(base_url=url, timeout=10) as client:
            for _ in range(1500):  # more lines than a pipe holds
                assert client.get("/nowhere" * 10).status_code == 404
            assert client.post("/v1/completions", json=BODY).status_code == 200
        pid = int(Path(f"{ready}.pid").read_text())
        os.kill(pid, signal.SIGTERM)
        begun = time.monotonic()
        while _is_alive(pid):
            assert time.monotonic() - begun < 10, "it does not end"
            time.sleep(0.05)
        popen.kill()


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_no_request_writes_a_line_of_its_own(tmp_path: Path) -> None:
    small = write_small_artifact(tmp_path / "small")
    forged = "a\nPOST /v1/completions 200 req-1 - 1+1 tokens 0.00 s\x1b[2K\x85"
    with served(small, "--log-requests") as (popen, url):
        assert httpx.post(f"{url}/v1/completions", json={**BODY, forged: 1}).status_code == 400
        httpx.post(f"{url}/v1/completions", json={**BODY, "metadata": {}, "model": forged})
        httpx.get(f"{url}/v1/models/{quote(forged)}")
        lines = stop(popen)
    assert len(lines) == 4
    assert all(line.isprintable() for line in lines)
    assert "a\\nPOST" in lines[0] and "\\x1b[2K" in lines[0]


def test_lines_that_cannot_be_written_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with stderr_of(writer, monkeypatch):
        log = LogWriter()
        begun = time.monotonic()
        for number in range(20_000):
            log.write(f"{number} " + "x" * 100)
        assert time.monotonic() - begun < 5
        assert not log.flush(0.05), "nobody reads it"
        seen = b""
        while b"lines of this log were lost\n" not in seen:
            seen += os.read(reader, 1 << 16)
        while not log.flush(0.01):
            os.read(reader, 1 << 16)
    os.close(reader)
    assert seen.startswith(b"0 xxx")


def test_an_exception_looks_like_no_line_of_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    handler = ServerLog().take_over()
    try:
        try:
            raise ValueError("seen\nerror: forged \x1b[2K")
        except ValueError:
            logging.getLogger("infc.server").exception("failed\nerror: forged too")
    finally:
        for name in ("infc.server", "uvicorn.error", "asyncio"):
            logging.getLogger(name).removeHandler(handler)
            logging.getLogger(name).propagate = True
    first, *rest = capsys.readouterr().err.splitlines()
    assert first == "error: failed\\nerror: forged too"
    assert rest and all(line.startswith("  ") and line.isprintable() for line in rest)


def test_what_asyncio_repeats_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    handler = ServerLog().take_over()
    try:
        for _ in range(1000):
            logging.getLogger("asyncio").error("socket.accept() out of system resource")
            logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    finally:
        for name in ("infc.server", "uvicorn.error", "asyncio"):
            logging.getLogger(name).removeHandler(handler)
            logging.getLogger(name).propagate = True
    assert capsys.readouterr().err.count("\n") == 1


def test_what_is_printable_stays_as_it_is() -> None:
    assert printable("für 你好 🙂 a/b") == "für 你好 🙂 a/b"
    assert printable("a\tb\r\n\u2028\x00\u202e") == r"a\tb\r\n\u2028\x00\u202e"
