"""The process of the container, as Kubernetes runs it: what it may do, its probes, and its end.

There is no container runtime here: a mount namespace has the read-only root, and `setpriv` takes
all capabilities away.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from .manifests import container, pod

# The mount of the root alone becomes read-only: others, such as /proc, are a container's own.
INSIDE = """
mount --make-rprivate / && mount -t tmpfs none "$1" && mkdir "$1/tmp" "$1/cache" || exit 90
mount -o bind,remount,ro / || exit 91
shift
exec setpriv --no-new-privs --inh-caps=-all --bounding-set=-all "$@"
"""
TOKENS = 400


def as_in_a_container() -> str | None:
    """Why a process cannot be run so here."""
    if os.geteuid() != 0 or not (shutil.which("unshare") and shutil.which("setpriv")):
        return "needs root, unshare and setpriv"
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False)
    return None if tried.returncode == 0 else "this machine allows no mount namespaces"


@dataclass(frozen=True)
class Running:
    """A container's process, and how its probes reach it."""

    popen: subprocess.Popen[str]
    url: str

    def probe(self, name: str) -> bool:
        """Whether a probe of the Deployment succeeds now."""
        asked = container()[name]
        try:
            answer = httpx.get(self.url + asked["httpGet"]["path"], timeout=asked["timeoutSeconds"])
        except httpx.TransportError:
            return False
        return 200 <= answer.status_code < 400

    def wait_until_started(self) -> None:
        """As the kubelet does, in fewer seconds."""
        deadline = time.monotonic() + 60
        while not self.probe("startupProbe"):
            assert self.popen.poll() is None, self.popen.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)


@contextlib.contextmanager
def run(artifact: Path, writable: Path, *, replicas: int = 0) -> Iterator[Running]:
    """The Deployment's container with the environment of the image, and another port and place."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    args = [{"/artifact": str(artifact), "8000": str(port)}.get(a, a) for a in container()["args"]]
    if replicas:
        args += ["--replicas", str(replicas)]
    image = (Path(__file__).parents[2] / "Dockerfile").read_text()
    environment = {
        "PATH": "/usr/bin:/bin",
        "INFC_API_KEY": "secret",
        "XDG_CACHE_HOME": f"{writable}/cache",
        "TMPDIR": f"{writable}/tmp",
        **dict(re.findall(r"\b(PYTHON[A-Z]+)=(\d)", image)),
    }
    assert environment["PYTHONDONTWRITEBYTECODE"] == "1"
    command = ["unshare", "--mount", "sh", "-c", INSIDE, "sh", str(writable)]
    popen = subprocess.Popen(
        [*command, sys.executable, "-m", "infc", *args],
        env=environment,
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Running(popen, f"http://127.0.0.1:{port}")
    finally:
        popen.kill()
        popen.communicate()


@pytest.mark.skipif(as_in_a_container() is not None, reason=str(as_in_a_container()))
@pytest.mark.parametrize("replicas", [0, 2])
def test_it_gets_ready_drains_and_ends_in_time(
    bundled: Path, tmp_path: Path, replicas: int
) -> None:
    with run(bundled, tmp_path, replicas=replicas) as running:
        assert not running.probe("readinessProbe")  # nothing listens before the model is open
        running.wait_until_started()
        assert running.probe("readinessProbe")
        assert running.probe("livenessProbe")
        request = {
            "model": "model",
            "prompt": "def f",
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "stream": True,
        }
        key = {"Authorization": "Bearer secret"}
        asked = f"{running.url}/v1/completions"
        with httpx.stream("POST", asked, json=request, headers=key, timeout=60) as answer:
            events = (line for line in answer.iter_lines() if line)
            next(events)
            running.popen.send_signal(signal.SIGTERM)
            begun = time.monotonic()
            while running.probe("readinessProbe"):
                assert time.monotonic() - begun < 10
                time.sleep(0.01)
            *_, last, done = events
        assert done == "data: [DONE]"
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        grace = pod()["terminationGracePeriodSeconds"]
        waits = container()["lifecycle"]["preStop"]["sleep"]["seconds"]
        out, err = running.popen.communicate(timeout=grace - waits)
        assert running.popen.returncode == 0, err
        # Each line that a collector of logs reads is JSON, and none of them an error.
        levels = {json.loads(line)["level"] for line in err.splitlines()}
        assert levels <= {"info", "warning"}, err
        assert out.startswith("serving model at http://0.0.0.0:")


@pytest.mark.skipif(as_in_a_container() is not None, reason=str(as_in_a_container()))
def test_the_root_of_that_process_is_read_only(tmp_path: Path) -> None:
    command = ["unshare", "--mount", "sh", "-c", INSIDE, "sh", str(tmp_path), "touch"]
    for path, expected in ((Path("/not-here"), 1), (tmp_path / "tmp" / "here", 0)):
        assert subprocess.run([*command, str(path)], capture_output=True).returncode == expected
    assert not Path("/not-here").exists()
