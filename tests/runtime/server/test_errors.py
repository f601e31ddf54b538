"""Everything that may be wrong with a request: one clear refusal, and nobody else notices."""

import contextlib
import http.client
import json
import random
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infc.runtime.server.bodies import check_fields
from infc.runtime.server.errors import ApiError
from infc.runtime.server.json_body import parse_json
from infc.runtime.server.protocol import ChatRequest, CompletionRequest

from .serving import VOCAB_SIZE, Serving, serving

COMPLETION: dict[str, Any] = {"model": "toy", "prompt": "def f", "max_tokens": 2}
USER = {"role": "user", "content": "hi"}
CHAT: dict[str, Any] = {
    "model": "toy",
    "messages": [USER],
    "max_tokens": 2,
}
PATHS = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}


def refusal(response: httpx.Response, status: int = 400) -> dict[str, Any]:
    """The error that a response carries, whose shape is checked."""
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    kinds = {429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    assert error["type"] == kind
    assert 0 < len(error["message"]) <= 500
    assert "Traceback" not in error["message"]
    return error


_Fields = list[tuple[str, list[Any]]]

BOTH: _Fields = [
    ("temperature", ["hot", -1, -0.1, 1e308, True, [0.5], 10**400]),
    ("top_p", [0, -0.5, 1.5, "all", True]),
    ("top_k", [-2, 2**40, 1.5, "5", True]),
    ("seed", [-(2**64), 2**65, 1.5, "7", True]),
    ("max_tokens", [0, -1, 2**63, 10**30, "5", 1.5, True]),
    ("stop", ["", ["a", ""], ["x"] * 17, "y" * 1025, 5, [5], [["a"]], {"a": 1}, True]),
    ("stop_token_ids", [[5] * 5000, -1, [-1], [VOCAB_SIZE], [2**31], ["5"], [True], [1.0], 5, {}]),
    ("ignore_eos", [1, "true"]),
    ("stream", [1, "yes"]),
    ("stream_options", [{"include_usage": True}, {"include_usage": 1}, {"other": 1}, 5, []]),
    ("model", [None, 5, ["toy"], {}]),
    ("n", [0, -1, 129, 10**6, 2**63, True, "1", 1.0]),
    ("presence_penalty", [2.1, -2.1, "0", 1e308, False]),
    ("frequency_penalty", [2.1, [0], "0"]),
    ("repetition_penalty", [0, -1, 101, "1", True]),
    ("logit_bias", [{"5": 101}, {"5": "1"}, {"5": True}, {"x": 1}, {"-1": 1}, {"٣": 1}, [], 5]),
    (
        "logit_bias",
        [{str(VOCAB_SIZE): 1}, {"9" * 10: 1}, {"1.0": 1}, {"": 1}, {"1\n": 1}, {"1": 1, "01": 2}],
    ),
    ("allowed_token_ids", [[], [-1], [VOCAB_SIZE], ["5"], 5, [True]]),
    ("banned_token_ids", [[-1], [VOCAB_SIZE], ["5"], 5, [[5]]]),
    ("min_p", [-0.1, 1.1, "0", True]),
    ("min_tokens", [-1, 3, 1.5, True, 2**40]),
    ("prompt_logprobs", [-1, 21, True, "2"]),
    ("user", [5, {}]),
    ("metadata", ["a", [1]]),
    ("store", [1, "yes"]),
    ("return_token_ids", [1, "yes"]),
    ("temprature", [None, 1]),
    ("__class__", [1]),
]
COMPLETIONS_ONLY: _Fields = [
    ("prompt", [None, "", [], [[]], [""], 5, 1.5, True, {}, {"text": "a"}]),
    ("prompt", [[-1], [2**31], [VOCAB_SIZE], [10**30], [True, False], [1.5], [[1, "a"]]]),
    ("prompt", [["a", 1], [[1], "a"], [[1], [[2]]], [1, [2]], [None], ["a", None]]),
    (
        "prompt",
        [["a"] * 65, [[1]] * 100_000, "x " * 2000, [5] * 512, [5] * 1_000_000, "z" * 1_000_000],
    ),
    ("prompt", [[5, "a"], ["a", []], [[5], []], [[5], [True]]]),
    ("logprobs", [-1, 21, 10**6, True, "2", 1.5]),
    ("best_of", [0, 129, True]),
    ("echo", [0, "no"]),
    ("suffix", ["end"]),
    ("messages", [[]]),
]
CHAT_ONLY: _Fields = [
    (
        "messages",
        [
            [{"role": "user", "content": ""}] * 5000,
            None,
            [],
            "hi",
            5,
            {"role": "user"},
            [5],
            [[]],
            ["hi"],
            [None],
        ],
    ),
    ("logprobs", [1, "true", 5]),
    ("top_logprobs", [1, -1, 21]),
    ("tools", [[{"type": "function", "function": {"name": "f"}}]]),
    ("tool_choice", ["required", {"type": "function"}]),
    ("response_format", [{"type": "json_object"}, {"type": "json_schema"}, 5]),
    ("chat_template", ["{{ 1 }}"]),
    ("chat_template_kwargs", [{"tokenize": True}]),
    ("reasoning_effort", ["high"]),
    ("modalities", [["audio"]]),
    ("prompt", ["hi"]),
]
FIELDS = {
    "/v1/completions": BOTH + COMPLETIONS_ONLY,
    "/v1/chat/completions": BOTH + CHAT_ONLY,
}
CASES: list[tuple[str, str, Any]] = [
    (path, field, value)
    for path, groups in FIELDS.items()
    for field, values in groups
    for value in values
]


def test_every_bad_field_is_named(server: Serving) -> None:
    wrong = []
    with httpx.Client(base_url=server.url) as client:
        for path, field, value in CASES:
            response = client.post(path, json={**PATHS[path], field: value})
            if response.status_code != 400:
                wrong.append((path, field, f"{value!r:.60}", response.status_code))
                continue
            param = refusal(response)["param"]
            if param is None or param.partition("[")[0].partition(".")[0] != field:
                wrong.append((path, field, f"{value!r:.60}", response.json()))
    assert not wrong


BAD_MESSAGES = [
    ({"content": "hi"}, "messages[1].role"),
    ({"role": "user"}, "messages[1].content"),
    ({"role": "user", "content": None}, "messages[1].content"),
    ({"role": "user", "content": 5}, "messages[1].content"),
    ({"role": "owner", "content": "hi"}, "messages[1].role"),
    ({"role": "tool", "content": "hi", "tool_call_id": "1"}, "messages[1].tool_call_id"),
    ({"role": "user", "content": "hi", "colour": 1}, "messages[1].colour"),
    ({"role": "user", "content": "hi", "user": "me"}, "messages[1].user"),
    ({"role": "assistant", "content": "", "tool_calls": [{}]}, "messages[1].tool_calls"),
    ({"role": "user", "content": [{"type": "text"}]}, "messages[1].content[0].text"),
    ({"role": "user", "content": [5]}, "messages[1].content[0]"),
    (
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        "messages[1].content[0].type",
    ),
]


@pytest.mark.parametrize(("message", "param"), BAD_MESSAGES, ids=lambda value: str(value)[-40:])
def test_bad_messages_are_named_by_place(
    server: Serving, message: dict[str, Any], param: str
) -> None:
    body = {**CHAT, "messages": [*CHAT["messages"], message]}
    assert refusal(server.post("/v1/chat/completions", body))["param"] == param


def test_neutral_and_harmless_fields_pass(server: Serving) -> None:
    both: dict[str, Any] = {
        "n": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "seed": None,
        "stop": None,
        "top_p": None,
        "stream_options": None,
        "user": "someone",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
    }
    completion = {**both, "best_of": 1, "echo": False, "suffix": None, "logprobs": None}
    chat = {
        **both,
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "logprobs": False,
    }
    for path, extra in (("/v1/completions", completion), ("/v1/chat/completions", chat)):
        response = server.post(path, {**PATHS[path], **extra})
        assert response.status_code == 200, response.text


RAW = {
    "nothing": b"",
    "half": b'{"model": "toy", "prompt": "a"',
    "not an object": b"[1, 2]",
    "a number": b"5",
    "deep arrays": b"[" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "deep and closed": b'{"model":"toy","prompt":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "deep enough to parse": b'{"model":"toy","prompt":' + b"[" * 900 + b"]" * 900 + b"}",
    "not UTF-8": b'{"model": "toy", "prompt": "\xff\xfe"}',
    "UTF-16": '{"model": "toy", "prompt": "a"}'.encode("utf-16"),
    "half a pair": b'{"model": "toy", "prompt": "\\ud83d"}',
    "half a pair in a key": b'{"model": "toy", "\\udc00": 1}',
    "a huge integer": b'{"model": "toy", "prompt": "a", "seed": ' + b"9" * 100_000 + b"}",
    "a large float": b'{"model": "toy", "prompt": "a", "temperature": 1e999}',
    "NaN": b'{"model": "toy", "prompt": "a", "temperature": NaN}',
    "Infinity": b'{"model": "toy", "prompt": "a", "top_p": -Infinity}',
    "a key twice": b'{"model": "toy", "prompt": "a", "prompt": "b"}',
    "a byte order mark": b'\xef\xbb\xbf{"model": "toy", "prompt": "a"}',
    "a NUL": b'{"model": "toy", "prompt": "a"\x00}',
}


IS_JSON = ("deep enough to parse", "a large float")
"""What a field of it holds is refused, not the body."""


@pytest.mark.parametrize("name", RAW)
def test_what_is_not_json_is_refused(server: Serving, name: str) -> None:
    for path in PATHS:
        error = refusal(server.post(path, RAW[name]))
        says_so = error["message"].startswith("the body is not valid JSON: ")
        assert (error["code"] == "invalid_json") == says_so == (name not in IS_JSON)


@pytest.mark.parametrize(
    "prompt",
    ["\x00", "a\x00b", "e" + "\u0301" * 1000, "\U0001f600" * 50, "<|im_end|>", " \n\t", "\u2028"],
    ids=ascii,
)
def test_strange_text_is_text(server: Serving, prompt: str) -> None:
    response = server.post("/v1/completions", {**COMPLETION, "prompt": prompt})
    if response.status_code != 200:  # a thousand marks are more tokens than fit
        assert "512" in refusal(response)["message"]


def test_prompt_too_long_says_by_how_much(server: Serving) -> None:
    error = refusal(server.post("/v1/completions", {**COMPLETION, "prompt": [5] * 600}))
    assert error["param"] == "prompt"
    assert "600" in error["message"] and "512" in error["message"]
    body = {**COMPLETION, "prompt": [5] * 500, "max_tokens": 13}
    error = refusal(server.post("/v1/completions", body))
    assert error["param"] == "max_tokens"
    assert all(number in error["message"] for number in ("500", "13", "512"))
    assert server.post("/v1/completions", {**body, "max_tokens": 12}).status_code == 200


def test_a_prompt_may_fill_the_context_where_no_answer_is_wanted(server: Serving) -> None:
    whole = {**COMPLETION, "prompt": [5] * 512, "max_tokens": 0, "echo": True}
    response = server.post("/v1/completions", whole)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["prompt_tokens"] == 512
    for change in ({"prompt": [5] * 513}, {"max_tokens": 1}):
        error = refusal(server.post("/v1/completions", {**whole, **change}))
        assert error["param"] == "prompt"


def test_a_long_prompt_holds_up_nobody() -> None:
    with serving(max_context=65_536, num_blocks=10) as server:
        text = "def foo(x): return x + 1  # abc\n" * 12_000
        bodies = [{**COMPLETION, "prompt": text}, {**CHAT, "messages": [{**USER, "content": text}]}]
        for path, body in zip(PATHS, bodies, strict=True):
            with ThreadPoolExecutor(1) as pool, httpx.Client(base_url=server.url) as client:
                begun = time.monotonic()
                pending = pool.submit(server.post, path, body)
                slowest = 0.0
                while not pending.done():
                    asked = time.monotonic()
                    assert client.get("/health").status_code == 200
                    slowest = max(slowest, time.monotonic() - asked)
                taken = time.monotonic() - begun
            assert "together is 65536" in refusal(pending.result())["message"]
            assert slowest < 0.5 * taken


def test_one_bad_prompt_of_several_refuses_them_all(server: Serving) -> None:
    for stream in (False, True):
        body = {**COMPLETION, "prompt": [[5, 6], [7] * 600, [8]], "stream": stream}
        assert refusal(server.post("/v1/completions", body))["param"] == "prompt"


def test_model_that_is_not_served(server: Serving) -> None:
    for name in ("gpt-4", "../../etc/passwd", "/etc/passwd", "", "toy "):
        for path, body in PATHS.items():
            error = refusal(server.post(path, {**body, "model": name}), 404)
            assert (error["param"], error["code"]) == ("model", "model_not_found")
    client = server.client()
    assert [model.id for model in client.models.list()] == ["toy"]
    assert client.models.retrieve("toy").owned_by == "infc"
    with pytest.raises(openai.NotFoundError, match="unknown model"):
        client.models.retrieve("../toy")


def test_routes_that_are_not_there(server: Serving) -> None:
    for path in ("/", "/v1", "/v1/embeddings", "/v1/completions/", "/redoc"):
        refusal(server.post(path, {}), 404)
    refusal(httpx.get(f"{server.url}/v1/completions"), 405)
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}
    assert "/v1/chat/completions" in httpx.get(f"{server.url}/openapi.json").json()["paths"]


def test_body_must_be_json_by_name_too(server: Serving) -> None:
    for media in ("text/plain", "application/x-www-form-urlencoded"):
        response = httpx.post(
            f"{server.url}/v1/completions",
            content=json.dumps(COMPLETION),
            headers={"Content-Type": media},
        )
        assert "content type application/json" in refusal(response, 415)["message"]


def test_body_too_large() -> None:
    with serving(max_body_bytes=10_000) as server:
        large = {**COMPLETION, "prompt": "x" * 20_000}
        error = refusal(server.post("/v1/completions", large), 413)
        assert "10000" in error["message"]

        def chunks() -> Any:  # no length is announced
            yield from [json.dumps(large).encode()[i : i + 1000] for i in range(0, 20_000, 1000)]

        headers = {"Content-Type": "application/json"}
        response = httpx.post(f"{server.url}/v1/completions", content=chunks(), headers=headers)
        refusal(response, 413)
        response = server.post("/v1/completions", COMPLETION)
        assert response.status_code == 200


def test_body_that_never_comes() -> None:
    with serving(body_seconds=0.2) as server:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=10)
        connection.putrequest("POST", "/v1/completions")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", "100")
        connection.endheaders(b'{"model"')
        response = connection.getresponse()
        assert response.status == 408
        assert json.loads(response.read())["error"]["type"] == "invalid_request_error"
        connection.close()


def test_what_is_not_http(server: Serving) -> None:
    place = urlsplit(server.url)
    for data in (b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/1.1\r\nHost: " + b"a" * 200_000 + b"\r\n"):
        with socket.create_connection((place.hostname or "", place.port or 0), 10) as raw:
            raw.sendall(data)
            with contextlib.closing(http.client.HTTPResponse(raw)) as response:
                response.begin()
                assert response.status == 400
                error = json.loads(response.read())["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_http")
    assert server.post("/v1/completions", COMPLETION).status_code == 200


def test_wrong_key_is_refused_before_anything_is_read() -> None:
    with serving(api_key="sesame ö") as server:
        for given_key in ("none", "sesame", "sesame o"):
            with pytest.raises(openai.AuthenticationError) as caught:
                server.client(api_key=given_key).models.list()
            assert "sesame" not in caught.value.message
        refusal(server.post("/v1/completions", RAW["deep arrays"]), 401)
        headers = {b"Authorization": "Bearer sesame ö".encode()}
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_full_queue_says_come_again() -> None:
    with serving(max_waiting=1) as server:
        server.model.delay_seconds = 0.02
        response = server.post("/v1/completions", {**COMPLETION, "prompt": [[5]] * 60})
        error = refusal(response, 429)
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert 1 <= int(response.headers["Retry-After"]) <= 60
        server.wait_until_empty()


def test_dead_engine_fails_everybody_and_health() -> None:
    with serving() as server:
        assert server.post("/v1/completions", COMPLETION).status_code == 200
        server.model.failure = RuntimeError("secret internals")
        for path, body in PATHS.items():
            error = refusal(server.post(path, body), 503)
            assert "secret" not in error["message"]
        response = httpx.get(f"{server.url}/health")
        assert response.status_code == 503


def test_a_step_that_fails_ends_its_answers_alone() -> None:
    with serving() as server:
        server.model.failure = MemoryError("secret internals")
        error = refusal(server.post("/v1/completions", COMPLETION), 500)
        assert error["code"] == "generation_failed" and "secret" not in error["message"]
        assert httpx.get(f"{server.url}/health").status_code == 200
        server.model.failure = None
        assert server.post("/v1/completions", COMPLETION).status_code == 200
        server.wait_until_empty()


def test_error_in_the_middle_of_a_stream_is_an_event() -> None:
    with serving() as server:
        server.model.delay_seconds = 0.02
        chunks = server.client().completions.create(
            model="toy", prompt="a", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
        )
        assert next(iter(chunks)).choices
        server.model.failure = RuntimeError("secret internals")
        with pytest.raises(openai.APIError, match="stopped"):
            list(chunks)


def check_or_refuse(check: Callable[[], object]) -> None:
    """Any end but a request and a refusal that a client can read is an error."""
    refused = None
    try:
        check()
    except ApiError as error:
        refused = error
    assert refused is None or (refused.status == 400 and json.dumps(refused.body).isascii())


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["toy", "user", "text", 0, 1, "auto"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
NAMES = sorted({*CompletionRequest.model_fields, *ChatRequest.model_fields, "n", "tools", "user"})


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@given(body=st.dictionaries(st.sampled_from(NAMES) | st.text(), JSON), data=st.data())
def test_any_object_is_a_request_or_a_refusal(body: dict[str, Any], data: st.DataObject) -> None:
    base = data.draw(st.sampled_from([COMPLETION, CHAT, {}]))
    for kind in (CompletionRequest, ChatRequest):
        check_or_refuse(partial(check_fields, {**base, **body}, kind))


@settings(max_examples=300)
@given(seed=st.integers(0, 2**32), cuts=st.integers(1, 4))
def test_damaged_bodies_are_requests_or_refusals(seed: int, cuts: int) -> None:
    chance = random.Random(seed)
    data = bytearray(json.dumps({**CHAT, "stop": ["\U0001f600", "é"], "seed": 5}).encode())
    for _ in range(cuts):
        data[chance.randrange(len(data))] = chance.randrange(256)
    check_or_refuse(lambda: check_fields(parse_json(bytes(data)), ChatRequest))


def test_no_messages_is_said_in_plain_words() -> None:
    with pytest.raises(ApiError) as caught:
        check_fields({"model": "m", "messages": []}, ChatRequest)
    assert caught.value.message == "messages: it is empty"
