"""Ray Serve with two engines that are killed, stopped or poisoned: no answer changes or is lost."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

import infc
import infc.ray
from infc.ir.artifact import Artifact

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TINY = Path(__file__).resolve().parents[2] / "recipes" / "tiny"
DEADLY = 4001
"""A token: a step with it ends its process."""

RISKY = f"""
import os
from infc.runtime.executors.cpp import CppExecutor
launch = CppExecutor.launch
def risky(self, step):
    if {DEADLY} in step.token_ids:
        os._exit(1)  # at once: Ray handles SIGSEGV, and lets steps go on meanwhile
    return launch(self, step)
CppExecutor.launch = risky
"""

COMMON = {"model": "tiny", "logit_bias": {str(DEADLY): -100}, "return_token_ids": True}
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("completions", {"prompt": "def f(", "seed": 1, "max_tokens": 200, "ignore_eos": True}),
    ("completions", {"prompt": "def g(", "temperature": 0, "max_tokens": 150, "ignore_eos": True}),
    (
        "completions",
        {"prompt": ["class A", "x ="], "n": 2, "seed": 3, "max_tokens": 120, "ignore_eos": True},
    ),
    (
        "completions",
        {
            "prompt": "import os",
            "seed": 4,
            "max_tokens": 150,
            "ignore_eos": True,
            "logprobs": 2,
            "presence_penalty": 0.5,
            "repetition_penalty": 1.2,
        },
    ),
    (
        "completions",
        {"prompt": "for i in", "seed": 5, "max_tokens": 150, "min_tokens": 60, "stop": ["self"]},
    ),
    (
        "chat/completions",
        {
            "messages": [{"role": "user", "content": "for x in range"}],
            "seed": 6,
            "max_tokens": 150,
            "ignore_eos": True,
        },
    ),
]


@dataclass(frozen=True)
class Cluster:
    """The application under test."""

    url: str

    def engines(self) -> dict[str, int]:
        """Processes of engines, by the names of their actors."""
        import ray  # takes seconds: not while tests are collected

        # Ray's own list; the public one needs the dashboard.
        actors = ray._private.state.actors().values()
        return {
            each["Name"]: each["Pid"]
            for each in actors
            if each["State"] == "ALIVE" and "#Engine#" in each["Name"]
        }

    def ready(self) -> None:
        """Until there are two engines."""
        from ray import serve

        deadline = time.monotonic() + 60
        while True:
            replicas = serve.status().applications["infc"].deployments["Engine"].replica_states
            if replicas == {"RUNNING": 2}:
                return
            assert time.monotonic() < deadline, replicas
            time.sleep(0.1)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The bundled model."""
    output = tmp_path_factory.mktemp("ray") / "tiny.infc"
    return infc.compile(TINY / "model.yaml", output=output, verify=False)


@pytest.fixture(scope="module")
def cluster(artifact: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Ray on this machine, with the application, from arguments as a configuration file has."""
    from ray import serve

    from ..ray_cluster import cluster_alone

    folder = tmp_path_factory.mktemp("risky")
    (folder / "sitecustomize.py").write_text(RISKY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with cluster_alone():
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        application = infc.ray.build(
            {
                "artifact": str(artifact.path),
                "num_replicas": "2",
                "routing": "round-robin",
                "kv_memory": "64MiB",
                "hang_seconds": 3,
                "model_name": "tiny",
                "actor_options": {"runtime_env": {"env_vars": {"PYTHONPATH": str(folder)}}},
            }
        )
        serve.run(application, name="infc")
        yield Cluster(f"http://127.0.0.1:{port}")


class Transcript:
    """What a client was told, choice by choice; `num_events` counts what has come so far."""

    def __init__(self) -> None:
        self.num_events = 0
        self.choices: defaultdict[int, dict[str, Any]] = defaultdict(
            lambda: {"text": "", "token_ids": [], "logprobs": [], "finish_reason": None}
        )
        self.is_done = False
        self.usage: Any = None

    def add(self, event: str) -> None:
        self.num_events += 1
        if event == "[DONE]":
            self.is_done = True
            return
        data = json.loads(event)
        assert "error" not in data, data
        self.usage = data.get("usage") or self.usage
        for choice in data["choices"]:
            told = self.choices[choice["index"]]
            assert told["finish_reason"] is None
            told["text"] += choice.get("text") or choice.get("delta", {}).get("content") or ""
            told["token_ids"] += choice.get("token_ids") or []
            if (entries := choice.get("logprobs")) is not None:
                told["logprobs"].append(entries.get("token_logprobs"))
            told["finish_reason"] = choice["finish_reason"]

    def whole(self) -> dict[int, dict[str, Any]]:
        """All that was told."""
        assert self.is_done
        for told in self.choices.values():
            told["logprobs"] = [one for part in told["logprobs"] for one in part or ()]
        return dict(self.choices)


def stream(url: str, route: str, body: dict[str, Any], told: Transcript) -> None:
    """Reads one stream to its end."""
    body = {**COMMON, **body, "stream": True, "stream_options": {"include_usage": True}}
    with httpx.stream("POST", f"{url}/v1/{route}", json=body, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if line.startswith("data: "):
                told.add(line.removeprefix("data: "))


def run_all(cluster: Cluster, disturb: Any = None) -> list[Any]:
    """The transcripts of all requests at once; `disturb` is called when each has begun."""
    told = [Transcript() for _ in REQUESTS]
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        runs = [
            pool.submit(stream, cluster.url, route, body, each)
            for (route, body), each in zip(REQUESTS, told, strict=True)
        ]
        if disturb is not None:
            while not all(each.num_events > 4 for each in told):
                assert not any(run.done() for run in runs), [run.result() for run in runs]
                time.sleep(0.002)
            disturb()
        for run in runs:
            run.result()
    return [each.whole() for each in told]


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> list[Any]:
    """The transcripts where nothing happens."""
    return run_all(cluster)


def test_answers_are_those_of_one_engine(
    cluster: Cluster, artifact: Artifact, undisturbed: list[Any]
) -> None:
    params = infc.SamplingParams(
        max_tokens=200, temperature=1.0, seed=1, ignore_eos=True, logit_bias={DEADLY: -100}
    )
    with infc.LLM(artifact, threads=2, kv_memory="64MiB") as llm:
        (alone,) = llm.generate(["def f("], params)
    assert undisturbed[0][0]["token_ids"] == list(alone.outputs[0].token_ids)
    assert undisturbed[0][0]["text"] == alone.outputs[0].text
    assert [len(each) for each in undisturbed] == [1, 1, 4, 1, 1, 1]
    assert len(undisturbed[3][0]["logprobs"]) == 150


def test_an_engine_is_killed_in_mid_stream(cluster: Cluster, undisturbed: list[Any]) -> None:
    cluster.ready()
    before = cluster.engines()
    assert len(before) == 2

    def kill() -> None:
        os.kill(min(before.values()), signal.SIGKILL)

    assert run_all(cluster, kill) == undisturbed
    cluster.ready()
    assert len(cluster.engines().keys() & before.keys()) == 1


def test_all_engines_are_killed_in_mid_stream(cluster: Cluster, undisturbed: list[Any]) -> None:
    import ray

    cluster.ready()
    before = cluster.engines()

    def kill() -> None:
        for name in before:
            ray.kill(ray.get_actor(name, namespace="serve"))

    assert run_all(cluster, kill) == undisturbed
    cluster.ready()
    assert not cluster.engines().keys() & before.keys()


def test_an_engine_is_stopped_in_mid_stream(cluster: Cluster, undisturbed: list[Any]) -> None:
    cluster.ready()
    pid = min(cluster.engines().values())
    try:
        assert run_all(cluster, lambda: os.kill(pid, signal.SIGSTOP)) == undisturbed
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_request_that_kills_engines_is_given_up(cluster: Cluster, undisturbed: list[Any]) -> None:
    cluster.ready()
    poison: list[httpx.Response] = []

    def send() -> None:
        body = {"model": "tiny", "prompt": [5, DEADLY, 7], "max_tokens": 5}
        poison.append(httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60))

    sender = threading.Thread(target=send)
    assert run_all(cluster, sender.start) == undisturbed
    sender.join()
    assert poison[0].status_code == 500
    assert "this request was given up" in poison[0].json()["error"]["message"]


def generated(cluster: Cluster) -> float:
    """Tokens of all answers, as the front counts them."""
    metrics = httpx.get(f"{cluster.url}/metrics").text
    (line,) = [one for one in metrics.splitlines() if one.startswith("infc_generation_tokens_tot")]
    return float(line.split()[1])


def test_routes_and_refusals(cluster: Cluster) -> None:
    cluster.ready()
    assert httpx.get(f"{cluster.url}/v1/models").json()["data"][0]["id"] == "tiny"
    assert httpx.get(f"{cluster.url}/health").json() == {"status": "ok"}
    refused = httpx.post(
        f"{cluster.url}/v1/completions",
        json={"model": "tiny", "prompt": "x" * 9000, "max_tokens": 5},
        timeout=60,
    )
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "prompt"
    before = generated(cluster)
    body = {"model": "tiny", "prompt": "def", "max_tokens": 8, "ignore_eos": True}
    httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60).raise_for_status()
    assert generated(cluster) == before + 8


def test_a_client_that_leaves_ends_its_request(cluster: Cluster) -> None:
    cluster.ready()
    body = {**COMMON, "prompt": "def", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{cluster.url}/v1/completions", json=body, timeout=60) as answer:
        next(answer.iter_lines())
    deadline = time.monotonic() + 10
    while True:
        metrics = httpx.get(f"{cluster.url}/metrics").text
        if 'infc_completions_total{finish_reason="abort"}' in metrics:
            return
        assert time.monotonic() < deadline, metrics
        time.sleep(0.05)
