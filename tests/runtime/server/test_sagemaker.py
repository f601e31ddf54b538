"""The routes that SageMaker calls, and how `infc serve` starts in its containers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click
import httpx
import pytest

from infc.driver.cli import run
from infc.driver.commands.serve import _place

from .serving import Serving, serving

MESSAGES = [{"role": "user", "content": "Write a class for a stack."}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Serving]:
    """A server in that mode, with a key."""
    with serving(sagemaker=True, api_key="secret") as running:
        yield running


def post(endpoint: Serving, path: str, body: object) -> httpx.Response:
    """With the key."""
    key = {"Authorization": "Bearer secret"}
    return httpx.post(f"{endpoint.url}{path}", json=body, headers=key, timeout=30)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES, **GREEDY}),
        ("/v1/completions", {"prompt": "def f", **GREEDY}),
        ("/v1/completions", {"prompt": ["def f", "class G"], "logprobs": 2, **GREEDY}),
    ],
)
def test_invocations_answer_as_the_routes_do(
    endpoint: Serving, path: str, body: dict[str, Any]
) -> None:
    expected = post(endpoint, path, {"model": "toy", **body}).json()
    for asked in (body, {**body, "model": "toy"}, {**body, "model": None}):
        answer = post(endpoint, "/invocations", asked)
        assert answer.status_code == 200
        assert answer.json()["choices"] == expected["choices"]
        assert answer.json()["model"] == "toy"


def test_invocations_stream(endpoint: Serving) -> None:
    whole = post(endpoint, "/invocations", {"messages": MESSAGES, **GREEDY}).json()
    answer = post(endpoint, "/invocations", {"messages": MESSAGES, "stream": True, **GREEDY})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    parts = [json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events]
    assert "".join(parts) == whole["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"messages": [], **GREEDY}, 400, "messages"),
        (dict(GREEDY), 400, "prompt"),
        ({"prompt": "a", "model": "other"}, 404, "model"),
        ({"prompt": "a", "temprature": 1}, 400, "temprature"),
    ],
)
def test_invocations_are_refused_as_elsewhere(
    endpoint: Serving, body: dict[str, Any], status: int, param: str
) -> None:
    answer = post(endpoint, "/invocations", body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_key_is_needed_for_invocations_alone(endpoint: Serving) -> None:
    assert endpoint.post("/invocations", {"prompt": "a"}).status_code == 401
    ping = httpx.get(f"{endpoint.url}/ping")
    assert (ping.status_code, ping.content) == (200, b"")


def test_ping_tells_that_the_engine_has_stopped() -> None:
    with serving(sagemaker=True) as running:
        assert httpx.get(f"{running.url}/ping").status_code == 200
        running.engine.shutdown()
        assert httpx.get(f"{running.url}/ping").status_code == 503


def test_routes_are_described_and_not_there_by_default(endpoint: Serving, server: Serving) -> None:
    paths = httpx.get(f"{endpoint.url}/openapi.json").json()["paths"]
    assert {"/ping", "/invocations"} <= set(paths)
    assert httpx.get(f"{server.url}/ping").status_code == 404
    assert server.post("/invocations", {"prompt": "a"}).status_code == 404


def test_place_is_the_one_that_sagemaker_prescribes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAGEMAKER_BIND_TO_PORT", raising=False)
    assert _place(None, None, None, True) == ("/opt/ml/model", "0.0.0.0", 8080)
    monkeypatch.setenv("SAGEMAKER_BIND_TO_PORT", "8555")
    assert _place("a", None, None, True) == ("a", "0.0.0.0", 8555)
    monkeypatch.setenv("SAGEMAKER_BIND_TO_PORT", "http")
    with pytest.raises(click.UsageError, match="'http', and no port"):
        _place("a", None, None, True)
    assert _place("a", "::1", 1, True) == ("a", "::1", 1)
    assert _place("a", None, None, False) == ("a", "127.0.0.1", 8000)
    assert _place("a", None, 0, False) == ("a", "127.0.0.1", 0)
    with pytest.raises(click.UsageError, match="missing argument 'MODEL'"):
        _place(None, None, None, False)


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        (["--sagemaker"], 25.0),
        (["--sagemaker", "--drain-seconds", "9"], 9.0),
        ([], None),
    ],
)
def test_drain_ends_before_sagemaker_kills(
    options: list[str], seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr("infc.runtime.server.run.serve", lambda _, **given: asked.append(given))
    monkeypatch.setattr(
        "infc.driver.open_model.artifact_and_names", lambda model, overrides: (model, ())
    )
    assert run(["serve", "a.infc", "--port", "0", *options]) == 0
    assert asked[0].get("drain_seconds") == seconds
