"""Limits of the server: each refuses what is more, by the status that is its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from openai import OpenAI
from openai.types import Completion

from infc.ir.errors import UsageError
from infc.runtime.server.settings import ServerSettings, limits

from .serving import Serving, serving
from .test_errors import CHAT, COMPLETION, USER, refusal


def connect(server: Serving) -> socket.socket:
    place = urlsplit(server.url)
    return socket.create_connection((place.hostname or "", place.port or 0), 10)


def is_closed(raw: socket.socket) -> bool:
    """Whether the server gave the connection up, with or without a word."""
    try:
        return raw.recv(1000) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize(
    ("settings", "path", "change", "param"),
    [
        ({"max_prompt_tokens": 5}, "/v1/completions", {"prompt": [7] * 6}, "prompt"),
        ({"max_prompt_tokens": 5}, "/v1/completions", {"prompt": "a b c d e f g"}, "prompt"),
        ({"max_prompt_tokens": 5}, "/v1/chat/completions", {}, "messages"),
        ({"max_output_tokens": 5}, "/v1/completions", {"max_tokens": 6}, "max_tokens"),
        ({"max_output_tokens": 5}, "/v1/chat/completions", {"max_tokens": 6}, "max_tokens"),
        ({"max_choices": 5}, "/v1/completions", {"n": 6}, "n"),
        ({"max_choices": 5}, "/v1/completions", {"best_of": 6}, "best_of"),
        ({"max_choices": 5}, "/v1/completions", {"n": 3, "prompt": ["a", "b"]}, "n"),
        ({"max_choices": 5}, "/v1/completions", {"prompt": ["a"] * 6}, "prompt"),
        ({"max_choices": 5}, "/v1/chat/completions", {"n": 6}, "n"),
        ({"max_stop_strings": 1}, "/v1/completions", {"stop": ["a", "b"]}, "stop"),
        ({"max_stop_strings": 0}, "/v1/chat/completions", {"stop": "a"}, "stop"),
        ({"max_logprobs": 2}, "/v1/completions", {"logprobs": 3}, "logprobs"),
        (
            {"max_logprobs": 2},
            "/v1/chat/completions",
            {"logprobs": True, "top_logprobs": 3},
            "top_logprobs",
        ),
        ({"max_logprobs": 2}, "/v1/completions", {"prompt_logprobs": 3}, "prompt_logprobs"),
        ({"max_messages": 1}, "/v1/chat/completions", {"messages": [USER] * 2}, "messages"),
        (
            {"max_messages": 1},
            "/v1/chat/completions",
            {"messages": [{**USER, "content": [{"type": "text", "text": "a"}] * 2}]},
            "messages",
        ),
        (  # of two prompts of three tokens, each in three choices
            {"max_logprob_entries": 53},
            "/v1/completions",
            {"prompt": [[5, 6, 7]] * 2, "n": 3, "prompt_logprobs": 2},
            "prompt_logprobs",
        ),
        (
            {"max_logprob_entries": 53},
            "/v1/completions",
            {"prompt": [[5, 6, 7]] * 2, "n": 3, "logprobs": 2, "echo": True, "stream": True},
            "prompt_logprobs",
        ),
        (  # of two tokens each
            {"max_logprob_entries": 17},
            "/v1/completions",
            {"n": 3, "logprobs": 2, "max_tokens": 2},
            "logprobs",
        ),
        (
            {"max_logprob_entries": 11},
            "/v1/chat/completions",
            {"logprobs": True, "top_logprobs": 5, "max_tokens": 2},
            "top_logprobs",
        ),
        ({"max_prompts": 1}, "/v1/completions", {"prompt": ["a", "b"]}, "prompt"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else None,
)  # fmt: skip
def test_one_more_is_refused(
    server: Serving, settings: dict[str, Any], path: str, change: dict[str, Any], param: str
) -> None:
    base = COMPLETION if path == "/v1/completions" else CHAT
    with serving(**settings) as strict:
        error = refusal(strict.post(path, {**base, **change}))
        assert error["param"] == param
        assert str(next(iter(settings.values()))) in error["message"]
    answer = server.post(path, {**base, **change})
    assert answer.status_code == 200, answer.text


def test_a_limit_of_output_is_the_default_too() -> None:
    with serving(max_output_tokens=5) as server:
        for path, base in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
            body = {**base, "ignore_eos": True}
            del body["max_tokens"]
            # Of 16, or all of the context.
            answer = server.post(path, body)
            if path == "/v1/completions":
                assert refusal(answer)["param"] == "max_tokens"
                continue
            assert answer.json()["usage"]["completion_tokens"] == 5


def test_full_queue_is_429_and_the_client_comes_again() -> None:
    with serving(max_waiting=2) as server:
        server.model.gate.clear()
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        options: dict[str, Any] = {"model": "toy", "prompt": [5], "max_tokens": 2}

        def ask() -> Completion:
            answer: Completion = client.completions.create(**options)
            return answer

        with ThreadPoolExecutor(64) as pool:
            first = pool.submit(ask)
            server.wait_until(lambda: server.engine.num_pending == 1)
            time.sleep(0.1)  # until it is in its step, which the gate holds up
            server.model.delay_seconds = 0.02
            rest = [pool.submit(ask) for _ in range(60)]
            server.wait_until(lambda: server.engine.num_pending > 30)
            server.model.gate.set()
            refused = [f.exception() for f in rest if f.exception() is not None]
            assert first.result().choices
        assert refused and len(refused) < 60
        for error in refused:
            assert isinstance(error, openai.RateLimitError)
            assert error.code == "queue_full"
            assert int(error.response.headers["Retry-After"]) >= 1
        patient = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=3)
        assert patient.completions.create(**options).choices


@pytest.mark.parametrize("stream", [False, True])
def test_a_draining_engine_is_503_and_no_full_queue(stream: bool) -> None:
    with serving() as server:
        assert asyncio.run(server.engine.drain(1))
        response = server.post("/v1/completions", {**COMPLETION, "stream": stream})
        assert refusal(response, 503)["code"] == "shutting_down"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_takes_too_long(stream: bool) -> None:
    with serving(request_seconds=0.3) as server:
        server.model.delay_seconds = 0.02
        body = {**COMPLETION, "max_tokens": 400, "ignore_eos": True, "stream": stream}
        begun = time.monotonic()
        response = server.post("/v1/completions", body)
        assert time.monotonic() - begun < 5
        if stream:
            assert response.status_code == 200
            event = json.loads(response.text.split("data: ")[-2])
            assert event["error"]["code"] == "timeout"
        else:
            assert refusal(response, 504)["code"] == "timeout"
        server.wait_until_empty()
        # Not yet begun: it waits behind nobody, and still its time runs out.
        server.model.gate.clear()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(server.post, "/v1/completions", {**body, "stream": False})
            time.sleep(0.5)
            server.model.gate.set()
            refusal(waiting.result(), 504)


def test_too_many_connections() -> None:
    with serving(max_connections=4) as server, contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(server)) for _ in range(4)]
        time.sleep(0.1)
        response = server.post("/v1/completions", COMPLETION)
        assert refusal(response, 503)["code"] == "too_many_connections"
        assert response.headers["Connection"] == "close"
        assert response.headers["Retry-After"] == "1"
        for raw in held:
            raw.close()
        time.sleep(0.1)
        assert server.post("/v1/completions", COMPLETION).status_code == 200


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"


def test_heads_that_come_too_slowly() -> None:
    with serving(header_seconds=0.4, keep_alive_seconds=5) as server:
        silent, slow, later = connect(server), connect(server), connect(server)
        body = json.dumps(COMPLETION).encode()
        whole = b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        later.sendall(HEAD + whole % (len(body), body))
        answer = b""
        while b'"usage"' not in answer:
            answer += later.recv(10_000)
        begun = time.monotonic()
        later.sendall(b"GET /hea")  # a second head, of which no more comes
        with contextlib.suppress(ConnectionError):
            for byte in HEAD:
                slow.sendall(bytes([byte]))
                time.sleep(0.05)
        for raw in (silent, slow, later):
            assert is_closed(raw)
            raw.close()
        assert 0.3 < time.monotonic() - begun < 4
        # An answer that takes longer than its head may is not cut off.
        server.model.delay_seconds = 0.05
        long = {**COMPLETION, "max_tokens": 20, "ignore_eos": True}
        assert server.post("/v1/completions", long).status_code == 200


def test_connections_idle_for_a_while_only() -> None:
    with serving(keep_alive_seconds=0.3) as server, connect(server) as raw:
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        begun = time.monotonic()
        answer = b""
        while b"ok" not in answer:
            answer += raw.recv(1000)
        assert is_closed(raw)
        assert time.monotonic() - begun < 3


def test_heads_that_are_too_long() -> None:
    with serving(max_header_bytes=2000) as server, connect(server) as raw:
        raw.sendall(HEAD + b"X-Long: " + b"a" * 3000)  # and no end of it
        assert raw.recv(1000).startswith(b"HTTP/1.1 400")


def test_heads_of_too_many_lines() -> None:
    """They take long to parse; lines of a body that comes with its head are not counted."""
    short = b"a: b\r\n"
    body = b"\n" * 300 + b"{}"
    kind = b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
    requests = {
        HEAD + short * 200 + b"\r\n": b"more than 128 headers",
        HEAD + short * 100 + kind + b"\r\n" + body: b"model: field required",
        HEAD + short * 125 + kind + b"\r\n" + body: b"model: field required",
        HEAD + short * 126 + kind + b"\r\n" + body: b"more than 128 headers",
        (HEAD + short * 100 + kind + b"\r\n").replace(b"\r", b"") + body: b"model: field required",
    }
    with serving() as server:
        for request, reason in requests.items():
            with connect(server) as raw:
                raw.sendall(request)
                answer = b""
                while not answer.endswith(b"}"):
                    answer += raw.recv(1000)
            assert answer.startswith(b"HTTP/1.1 400")
            assert reason in answer


def test_settings_out_of_range_are_refused_by_name() -> None:
    def make(**settings: Any) -> ServerSettings:
        return ServerSettings(model_names=("a",), **settings)

    for limit in limits():
        with pytest.raises(UsageError) as caught:
            make(**{limit.name: limit.low - 1})
        assert caught.value.where == limit.flag
        make(**{limit.name: limit.low})
    with pytest.raises(UsageError, match="name"):
        ServerSettings(model_names=())
