"""Every wait on a socket ends, whoever comes is told, and files run out for nobody."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from ..small_artifact import write_small_artifact
from .serving import Serving, serving
from .test_errors import COMPLETION
from .test_limits import connect, is_closed

JSON = b"Content-Type: application/json\r\n"
LENGTH = b"Content-Length: 1000000\r\n\r\n"
UNREAD = {
    "401": (b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n" + JSON + LENGTH, b"401"),
    "404": (b"POST /nowhere HTTP/1.1\r\nHost: a\r\n" + LENGTH, b"404"),
    "405": (b"POST /health HTTP/1.1\r\nHost: a\r\n" + LENGTH, b"405"),
    "GET": (b"GET /health HTTP/1.1\r\nHost: a\r\n" + LENGTH, b"200"),
    "chunked": (
        b"POST /nowhere HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nfffff\r\n",
        b"404",
    ),
}


def wait_for_end(raw: socket.socket) -> None:
    """Until the server has closed the connection, whatever it had still to say."""
    with contextlib.suppress(ConnectionError):
        while raw.recv(10_000):
            pass


@pytest.mark.parametrize("name", UNREAD)
def test_a_body_that_nobody_wants_has_a_clock(name: str) -> None:
    request, status = UNREAD[name]
    limits: dict[str, Any] = {"body_seconds": 0.5, "keep_alive_seconds": 60}
    with serving(**limits, api_key="k") as server, connect(server) as raw:
        raw.sendall(request)
        assert raw.recv(10_000).split()[1] == status
        begun = time.monotonic()
        with contextlib.suppress(ConnectionError):  # a byte now and then is no excuse
            while time.monotonic() - begun < 30:
                raw.sendall(b"a")
                time.sleep(0.05)
        wait_for_end(raw)
        assert time.monotonic() - begun < 20


def test_a_connection_goes_on_once_an_unread_body_is_there(server: Serving) -> None:
    with connect(server) as raw:
        raw.sendall(b"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n")
        answer = raw.recv(10_000)
        assert answer.split()[1] == b"404"
        raw.sendall(b"abcde")
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        while b'{"status":"ok"}' not in answer:
            answer += raw.recv(10_000)


def test_a_body_that_waits_for_leave_is_not_waited_for(server: Serving) -> None:
    with connect(server) as raw:
        raw.sendall(
            b"POST /nowhere HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n"
            b"Expect: 100-continue\r\n\r\n"
        )
        assert raw.recv(10_000).split()[1] == b"404"
        wait_for_end(raw)


def test_two_lengths_are_the_last_of_a_connection(server: Serving) -> None:
    body = json.dumps(COMPLETION).encode()
    with connect(server) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n"
            b"Transfer-Encoding: chunked\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (JSON, len(body), body)
        )
        answer = b""
        while more := raw.recv(10_000):  # until it is closed
            answer += more
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"connection: close" in answer.lower()


def test_a_body_in_crumbs_is_refused(server: Serving) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n"
    with connect(server) as raw:
        with contextlib.suppress(ConnectionError):
            raw.sendall(head + JSON + b"\r\n" + b"1\r\na\r\n" * 2000)
        answer = b""
        while b"}}" not in answer:
            answer += raw.recv(10_000)
    assert answer.startswith(b"HTTP/1.1 400")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"
    body = json.dumps({**COMPLETION, "user": "u" * 20_000}).encode()
    pieces = (body[begin : begin + 20] for begin in range(0, len(body), 20))
    headers = {"Content-Type": "application/json"}
    url = f"{server.url}/v1/completions"
    assert httpx.post(url, content=pieces, headers=headers, timeout=30).status_code == 200


def test_who_is_one_too_many_is_told_and_closed() -> None:
    with serving(max_connections=4, header_seconds=60) as server, contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(server)) for _ in range(4)]
        time.sleep(0.1)
        begun = time.monotonic()
        silent = [connect(server) for _ in range(80)]
        answer = httpx.get(f"{server.url}/v1/models")
        assert answer.status_code == 503 and answer.headers["Connection"] == "close"
        health = httpx.get(f"{server.url}/health")
        assert health.status_code == 200, "whoever watches over it may still ask"
        assert health.headers["Connection"] == "close"
        for raw in silent:
            assert is_closed(raw)
            raw.close()
        assert time.monotonic() - begun < 30
        for raw in held:
            raw.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert raw.recv(1000).startswith(b"HTTP/1.1 200")


def test_few_files_are_fewer_connections(tmp_path: Path) -> None:
    small = write_small_artifact(tmp_path / "small")
    command = f"ulimit -n 300; exec {sys.executable} -m infc serve {small} --port 0"
    with subprocess.Popen(
        ["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as popen:
        try:
            assert popen.stdout is not None
            url = popen.stdout.readline().split()[3].removesuffix("/v1")
            place = urlsplit(url)
            with contextlib.ExitStack() as stack:
                for _ in range(600):
                    raw = socket.create_connection((place.hostname or "", place.port or 0), 10)
                    stack.enter_context(raw)
                for _ in range(20):
                    assert httpx.get(f"{url}/health", timeout=10).status_code == 200
            popen.send_signal(signal.SIGTERM)
            _, errors = popen.communicate(timeout=20)
        finally:
            popen.kill()
    assert popen.returncode == 0
    assert "connections at most: this process may have 300 files open" in errors
    assert len(errors) < 1000


def test_too_few_files_are_refused(tmp_path: Path) -> None:
    small = write_small_artifact(tmp_path / "small")
    command = f"ulimit -n 160; exec {sys.executable} -m infc serve {small} --port 0"
    result = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 2
    assert "ulimit -n" in result.stderr and "Traceback" not in result.stderr
