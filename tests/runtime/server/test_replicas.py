"""The server in front of engine processes: they die, and its clients see a pause."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import infc
from infc.runtime.async_streams import Inbox, Item, Listener
from infc.runtime.faults import GivenUpError
from infc.runtime.replicas.suspects import POISONOUS

from ..replicas.test_child import wait_for_end
from .serving import serving
from .test_process import RECIPE, Process, infc_serve, process

SETTINGS: dict[str, Any] = {"replicas": 2, "model_name": "tiny"}
BODY: dict[str, Any] = {
    "model": "tiny",
    "prompt": "def f",
    "max_tokens": 400,
    "temperature": 1.0,
    "seed": 3,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, compiled for this machine."""
    output = tmp_path_factory.mktemp("served") / "tiny.infc"
    infc.compile(RECIPE, output=output, verify=False)
    return output


def engines_of(server: Process) -> list[int]:
    """The engine processes that are open: those with threads of their own."""
    pid = server.popen.pid
    children = "".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    maps = {int(each): Path(f"/proc/{each}/maps").read_text() for each in children.split()}
    return [pid for pid, text in maps.items() if "tiny.infc" in text]


def health(server: Process) -> httpx.Response:
    return httpx.get(server.url.removesuffix("/v1") + "/health")


def test_streams_and_whole_answers_survive_their_engines(artifact: Path) -> None:
    with process(artifact, json.dumps(SETTINGS | {"replicas": 0})) as server:
        alone = server.client().completions.create(**BODY).choices[0].text
    with process(artifact, json.dumps(SETTINGS)) as server, ThreadPoolExecutor(8) as pool:

        def stream() -> str:
            chunks = server.client().completions.create(stream=True, **BODY)
            return "".join(chunk.choices[0].text for chunk in chunks)

        def whole() -> str:
            return str(server.client().completions.create(**BODY).choices[0].text)

        for _ in range(2):
            answers = [pool.submit(work) for work in (stream, whole) * 3]
            time.sleep(0.3)
            for pid in engines_of(server):
                os.kill(pid, signal.SIGKILL)
            assert [answer.result() for answer in answers] == [alone] * 6
        deadline = time.monotonic() + 20
        while True:
            answer = health(server)
            assert answer.status_code == 200
            replicas = answer.json()["replicas"]
            if [each["state"] for each in replicas] == ["ready", "ready"]:
                break
            assert time.monotonic() < deadline, replicas
            time.sleep(0.02)
        assert sum(each["restarts"] for each in replicas) >= 2
        page = httpx.get(server.url.removesuffix("/v1") + "/metrics").text
        assert 'infc_replica_ready{replica="1"} 1.0' in page
        assert "infc_replica_resumed_requests_total" in page
        server.popen.send_signal(signal.SIGTERM)
        assert server.end() == (0, "loaded\n")


def test_a_drain_also_waits_for_answers_whose_engine_dies(artifact: Path) -> None:
    with process(artifact, json.dumps(SETTINGS)) as server, ThreadPoolExecutor(2) as pool:
        answer = pool.submit(lambda: server.client().completions.create(**BODY))
        time.sleep(0.2)
        engines = engines_of(server)
        # As a service manager does it, which sends the signal to all of them.
        for pid in (server.popen.pid, *engines):
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.05)
        for pid in engines:
            os.kill(pid, signal.SIGKILL)
        usage = answer.result().usage
        assert usage is not None and usage.completion_tokens == BODY["max_tokens"]
        assert server.end() == (0, "loaded\n")


def test_clients_of_a_front_that_is_killed_hear_of_it_and_engines_end(artifact: Path) -> None:
    with process(artifact, json.dumps(SETTINGS)) as server:
        chunks = server.client().completions.create(stream=True, **BODY)
        next(iter(chunks))
        engines = engines_of(server)
        assert len(engines) == 2
        os.kill(engines[0], signal.SIGSTOP)
        server.popen.kill()
        begun = time.monotonic()
        with pytest.raises((openai.APIError, httpx.HTTPError)):
            for _ in chunks:
                pass
        assert time.monotonic() - begun < 2
        assert all(map(wait_for_end, engines))


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_says_come_again(artifact: Path, stream: bool) -> None:
    with process(artifact, json.dumps({"replicas": 1, "max_queue": 2})) as server:
        (pid,) = engines_of(server)
        os.kill(pid, signal.SIGSTOP)
        body = {"model": "tiny", "prompt": ["x"] * 3, "max_tokens": 2, "stream": stream}
        answer = httpx.post(f"{server.url}/completions", json=body)
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "queue_full"
        assert int(answer.headers["Retry-After"]) >= 1
        os.kill(pid, signal.SIGCONT)
        body["prompt"] = ["x"] * 2
        assert httpx.post(f"{server.url}/completions", json=body).status_code == 200


def test_too_many_are_refused_before_anything_starts(artifact: Path) -> None:
    done = infc_serve(str(artifact), "--replicas", "65", "--port", "0")
    assert done.returncode == 2
    assert done.stderr.strip() == "error: 65 engine processes are outside 1..64"


def test_a_client_is_told_that_its_request_was_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a front ends one, of which engine processes died."""

    async def give_up(self: Inbox) -> tuple[Listener, Item]:
        stream, _ = await get(self)
        return stream, GivenUpError(POISONOUS)

    get = Inbox.get
    with serving() as server:
        monkeypatch.setattr(Inbox, "get", give_up)
        answer = server.post("/v1/completions", {"model": "toy", "prompt": "x", "max_tokens": 4})
    assert answer.status_code == 500
    error = answer.json()["error"]
    assert (error["message"], error["code"]) == (POISONOUS, "generation_failed")
