"""Clients that leave, at every moment: their requests end and every block comes back."""

import asyncio
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from .serving import Serving, serving

LONG: dict[str, Any] = {
    "model": "toy",
    "prompt": "def f",
    "max_tokens": 480,
    "temperature": 0,
    "ignore_eos": True,
}


def send_raw(url: str, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
    """A connection that has sent a request and reads nothing."""
    place = urlsplit(url)
    request = httpx.Request("POST", f"{url}{path}", json=body)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    raw = socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.settimeout(10)
    raw.connect((place.hostname, place.port))
    raw.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + request.read())
    return raw


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_gone_before_the_first_token(stream: bool, path: str) -> None:
    with serving() as server:
        server.model.gate.clear()
        body = {**LONG, "stream": stream}
        if "chat" in path:
            del body["prompt"]
            body["messages"] = [{"role": "user", "content": "hi"}]
        raw = send_raw(server.url, body, path)
        server.wait_until(lambda: server.engine.num_pending == 1)
        raw.close()
        time.sleep(0.1)
        server.model.gate.set()
        server.wait_until_empty()
        assert server.model.num_tokens < 100, "it went on for nobody"


def test_gone_while_waiting_for_a_whole_answer(
    server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.model, "delay_seconds", 0.01)  # nearly five seconds in all
    before = server.model.num_tokens
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=0.2)
    server.wait_until_empty()
    assert server.model.num_tokens - before < 480


def test_a_crowd_leaves_in_the_middle_and_the_rest_never_notices(server: Serving) -> None:
    async def run() -> tuple[str, str]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:

            async def stream(num_chunks: int | None, prompt: str = "def f") -> str:
                options: dict[str, Any] = {"model": "toy", "max_tokens": 40, "temperature": 0}
                chunks = await client.completions.create(prompt=prompt, stream=True, **options)
                text = ""
                async for chunk in chunks:
                    text += chunk.choices[0].text
                    if num_chunks is not None:
                        num_chunks -= 1
                        if num_chunks <= 0:
                            await chunks.close()
                            break
                return text

            alone = await stream(None, "class Survivor")
            survivor = asyncio.create_task(stream(None, "class Survivor"))
            await asyncio.gather(*(stream(i % 7 + 1, f"value_{i} =") for i in range(40)))
            return alone, await survivor

    alone, survivor = asyncio.run(run())
    assert alone == survivor
    server.wait_until_empty()


def test_gone_with_many_prompts(server: Serving) -> None:
    raw = send_raw(server.url, {**LONG, "prompt": [f"a{i}" for i in range(20)], "stream": True})
    assert raw.recv(100)
    server.wait_until(lambda: server.engine.num_pending == 20)
    raw.close()
    server.wait_until_empty()


@pytest.mark.parametrize("extra", [{"n": 4}, {"best_of": 4, "stream": False}], ids=str)
def test_gone_with_many_choices(server: Serving, extra: dict[str, Any]) -> None:
    body = {**LONG, "prompt": ["a1", "a2", "a3"], "stream": True, "temperature": 1, **extra}
    before = server.model.num_tokens
    raw = send_raw(server.url, body)
    server.wait_until(lambda: server.engine.stats().num_running >= 12)
    raw.close()
    server.wait_until_empty()
    assert server.model.num_tokens - before < 12 * 480, "it went on for nobody"


def test_gone_in_the_middle_of_the_body(server: Serving) -> None:
    place = urlsplit(server.url)
    with socket.create_connection((place.hostname or "", place.port or 0)) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b'Content-Length: 100\r\n\r\n{"model"'
        )
        time.sleep(0.05)
    response = server.post("/v1/completions", {**LONG, "max_tokens": 2})
    assert response.status_code == 200


def test_a_reader_that_never_reads_is_cut_off() -> None:
    with serving(stall_seconds=0.3) as server:
        # Enough text to fill what the kernel takes on both sides: each token is one event.
        body = {**LONG, "prompt": [f"a{i}" for i in range(64)], "stream": True, "logprobs": 20}
        raw = send_raw(server.url, body)
        server.wait_until(lambda: server.engine.num_pending == 64)
        begun = time.monotonic()
        server.wait_until(lambda: server.engine.num_pending < 64 or time.monotonic() - begun > 8)
        server.wait_until_empty()
        assert server.model.num_tokens < 64 * 480, "it wrote everything for nobody"
        raw.close()
