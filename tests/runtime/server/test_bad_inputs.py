"""Groups of docs/bad-inputs.md that no other test of the server shows."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from .serving import Serving, serving
from .test_errors import CHAT, COMPLETION, PATHS, refusal
from .test_limits import connect

HEALTH = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"

# Fields of other servers, which clients send in good faith or in bad.
FOREIGN: dict[str, Any] = {
    "adapter": "../../etc",
    "cache_salt": "a" * 100_000,
    "extra_args": {"a": {"b": 1}},
    "grammar": "root ::= root",
    "guided_grammar": "(" * 60_000,
    "guided_json": {"$ref": "#"},
    "guided_regex": "(a+)+$",
    "json_schema": {"minItems": 10**9},
    "logits_processors": ["os.system"],
    "lora": "https://example.org/a",
    "priority": 2**63,
    "prompt_embeds": "gASVAAAA",
    "regex": "a{1,1000000000}",
}


@pytest.mark.parametrize("field", FOREIGN)
def test_what_is_not_built_is_refused_by_name(server: Serving, field: str) -> None:
    for path, body in PATHS.items():
        error = refusal(server.post(path, {**body, field: FOREIGN[field]}))
        assert (error["param"], error["code"]) == (field, "unknown_field")


@pytest.mark.parametrize(
    "value",
    [
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": "#"}}},
        {"type": "json_schema", "json_schema": {}},
        {"type": "regex", "pattern": "(?<=a)b"},
        {"type": "grammar"},
    ],
)
def test_constrained_output_is_refused_by_name(server: Serving, value: dict[str, Any]) -> None:
    error = refusal(server.post("/v1/chat/completions", {**CHAT, "response_format": value}))
    assert (error["param"], error["code"]) == ("response_format", "not_built")


def test_pipelined_requests_are_answered_in_order(server: Serving) -> None:
    body = json.dumps(COMPLETION).encode()
    post = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    post += b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    with connect(server) as raw:
        raw.sendall(HEALTH + post + HEALTH * 50 + b"GET /nowhere HTTP/1.1\r\nHost: a\r\n\r\n")
        answers = b""
        while b"unknown_route" not in answers:
            answers += raw.recv(10_000)
    assert answers.count(b"HTTP/1.1 200") == 52
    assert answers.index(b"text_completion") > answers.index(b'{"status":"ok"}')


def test_lengths_that_are_wrong(server: Serving) -> None:
    body = json.dumps(COMPLETION).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
    short = head + b"Content-Length: %d\r\n\r\n%b" % (len(body) - 5, body)
    twice = head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n"
    for request in (short, twice, head + b"Content-Length: -1\r\n\r\n"):
        with connect(server) as raw:
            raw.sendall(request)
            assert raw.recv(10_000).startswith(b"HTTP/1.1 400")


def test_what_clients_write_is_no_label_of_the_metrics(server: Serving) -> None:
    with httpx.Client(base_url=server.url) as client:
        for number in range(50):
            client.get(f"/nowhere/{number}")
            client.get(f"/v1/models/{number}")
            client.post("/v1/completions", json={**COMPLETION, "user": f"user-{number}", "n": 0})
        text = client.get("/metrics").text
    assert "nowhere" not in text and "user-" not in text
    assert text.count("infc_http_requests_total{") < 40


def test_a_thousand_leave_at_once() -> None:
    with serving(max_waiting=2000, request_seconds=60) as server:
        server.model.gate.clear()
        body = {**COMPLETION, "prompt": [[5]] * 50, "max_tokens": 400, "ignore_eos": True}

        def give_up() -> None:
            with pytest.raises(httpx.TimeoutException):
                httpx.post(f"{server.url}/v1/completions", json=body, timeout=1.0)

        with ThreadPoolExecutor(20) as pool:
            for one in [pool.submit(give_up) for _ in range(20)]:
                one.result()
        server.model.gate.set()
        server.wait_until_empty()
        assert server.post("/v1/completions", COMPLETION).status_code == 200


def test_ids_between_the_tokenizer_and_the_embedding(server: Serving) -> None:
    last = server.engine.engine.vocab_size - 1
    for prompt, status in (([last], 200), ([last + 1], 400), ([2**31], 400), ([-1], 400)):
        answer = server.post("/v1/completions", {**COMPLETION, "prompt": prompt})
        assert answer.status_code == status


def test_not_a_number_is_refused_in_every_field(server: Serving) -> None:
    for field in ("temperature", "top_p", "min_p", "presence_penalty", "repetition_penalty"):
        for value in ("NaN", "Infinity", "-Infinity", "1e999", '"1"'):
            body = json.dumps(COMPLETION)[:-1] + f', "{field}": {value}}}'
            refusal(server.post("/v1/completions", body.encode()))
        tiny = server.post("/v1/completions", {**COMPLETION, "temperature": 1e-30})
        assert tiny.status_code == 200
        none = server.post("/v1/completions", {**COMPLETION, field: None})
        assert none.status_code == 200, "as if it were left out"
