"""Plain HTTP: HEAD, schemes in any case, and how a server says that it stops."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from infc.ir.artifact import ArtifactWriter, open_artifact
from infc.runtime.server.certificate import read_certificate

from ..small_artifact import write_small_artifact
from .serving import Serving, serving
from .test_errors import refusal
from .test_stderr import BODY, served

LONG = {**BODY, "prompt": [[5, 6, 7], [7, 6, 5]], "n": 64, "max_tokens": 90}  # some seconds of work


@pytest.mark.parametrize(
    "path",
    ["/health", "/version", "/metrics", "/v1/models", "/v1/models/toy", "/openapi.json", "/docs"],
)
def test_head_is_get_without_a_body(server: Serving, path: str) -> None:
    head, get = httpx.head(f"{server.url}{path}"), httpx.get(f"{server.url}{path}")
    assert head.status_code == get.status_code == 200
    assert head.content == b"" and get.content
    assert head.headers["content-type"] == get.headers["content-type"]
    if path != "/metrics":
        assert head.headers["content-length"] == get.headers["content-length"]


def test_head_of_what_is_not_there(server: Serving) -> None:
    for path, status in (("/nowhere", 404), ("/v1/models/other", 404), ("/v1/completions", 405)):
        answer = httpx.head(f"{server.url}{path}")
        assert (answer.status_code, answer.content) == (status, b"")
    assert httpx.post(f"{server.url}/health").headers["allow"] == "GET, HEAD"


def test_a_model_has_the_certificate_of_its_artifact(server: Serving) -> None:
    certificate = {"bits_per_weight": 4.3, "figures": {"kl_mean": 0.01}}
    with serving(certificate=certificate) as certified:
        found = httpx.get(f"{certified.url}/v1/models/toy").json()
        (listed,) = httpx.get(f"{certified.url}/v1/models").json()["data"]
    assert found == {**listed, "certificate": certificate}
    assert httpx.get(f"{server.url}/v1/models/toy").json()["certificate"] is None


def test_a_certificate_is_read_from_the_report(tmp_path: Path) -> None:
    artifact = open_artifact(write_small_artifact(tmp_path / "small"))
    assert read_certificate(artifact) is None
    for report, expected in (
        ('{"certificate": {"figures": null}}', {"figures": None}),
        ('{"certificate": 3}', None),
        ("[]", None),
    ):
        place = tmp_path / "copy"
        with ArtifactWriter(place) as writer:
            shutil.copytree(artifact.path, writer.path, dirs_exist_ok=True)
            (writer.path / "report.json").write_text(report)
            writer.commit(artifact.manifest)
        assert read_certificate(open_artifact(place)) == expected


def test_the_scheme_of_the_key_may_be_in_any_case() -> None:
    with serving(api_key="Sesame") as server:
        for value, status in (
            ("Bearer Sesame", 200),
            ("bearer Sesame", 200),
            ("BEARER   Sesame", 200),
            ("Bearer sesame", 401),
            ("Basic Sesame", 401),
            ("Sesame", 401),
            ("Bearer", 401),
            ("Bearer Sesame Sesame", 401),
            ("", 401),
        ):
            answer = httpx.get(f"{server.url}/v1/models", headers={"Authorization": value})
            assert answer.status_code == status, value


@pytest.mark.slow
def test_a_hangup_lets_answers_end(tmp_path: Path) -> None:
    small = write_small_artifact(tmp_path / "small")
    with served(small) as (popen, url), httpx.Client(timeout=60) as client:
        with client.stream("POST", f"{url}/v1/completions", json={**LONG, "stream": True}) as got:
            lines = got.iter_lines()
            next(lines)
            popen.send_signal(signal.SIGHUP)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        _, errors = popen.communicate(timeout=20)
    assert popen.returncode == 0
    assert errors.startswith("stopping, 2 answers") and errors.count("\n") == 1


def test_a_hangup_that_is_ignored_stays_so(tmp_path: Path) -> None:
    small = write_small_artifact(tmp_path / "small")
    command = f"trap '' HUP; exec {sys.executable} -m infc serve {small} --port 0"
    with subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE, text=True) as popen:
        assert popen.stdout is not None
        url = popen.stdout.readline().split()[3].removesuffix("/v1")
        popen.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert httpx.get(f"{url}/health").status_code == 200
        popen.terminate()
        assert popen.wait(20) == 0


def num_requests(url: str) -> int:
    """Requests that run or wait, as the metrics have it."""
    text = httpx.get(f"{url}/metrics", timeout=60).text
    counts = re.findall(r"^infc_requests_(?:running|waiting) (\d+)", text, re.MULTILINE)
    return sum(map(int, counts))


@pytest.mark.parametrize("second_signal", [False, True])
def test_a_drain_that_takes_too_long_has_no_error_lines(
    tmp_path: Path, second_signal: bool
) -> None:
    small = write_small_artifact(tmp_path / "small")
    seconds = "60" if second_signal else "0.2"
    with served(small, "--drain-seconds", seconds) as (popen, url):
        whole: list[httpx.Response | Exception] = []
        begun = threading.Event()
        events: list[str] = []

        def ask() -> None:
            try:
                whole.append(httpx.post(f"{url}/v1/completions", json=LONG, timeout=60))
            except httpx.TransportError as error:
                whole.append(error)

        def listen() -> None:
            body = {**LONG, "stream": True}
            with (
                contextlib.suppress(httpx.TransportError),
                httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer,
            ):
                for line in answer.iter_lines():
                    events.extend([line] if line else [])
                    begun.set()

        threads = [threading.Thread(target=listen), threading.Thread(target=ask)]
        threads[0].start()
        assert begun.wait(60)
        before = num_requests(url)  # which becomes less by itself, and never more
        threads[1].start()
        deadline = time.monotonic() + 60
        while num_requests(url) <= before:
            assert time.monotonic() < deadline
        popen.send_signal(signal.SIGTERM)
        if second_signal:
            time.sleep(0.3)
            popen.send_signal(signal.SIGTERM)
        _, errors = popen.communicate(timeout=30)
        for thread in threads:
            thread.join()
    assert popen.returncode == 0
    assert errors.startswith("stopping, ") and errors.count("\n") == 1
    if second_signal:
        return
    assert isinstance(whole[0], httpx.Response)
    assert refusal(whole[0], 503)["code"] == "shutting_down"
    assert int(whole[0].headers["Retry-After"]) >= 1
    assert events[-1] == "data: [DONE]"
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
