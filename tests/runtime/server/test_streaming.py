"""Streams on their way: what is sent at once, who waits for whom, and clients that read slowly."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Sequence
from typing import Any

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from infc.runtime import async_streams
from infc.runtime.async_streams import Inbox, Item, Listener
from infc.runtime.requests.outputs import RequestOutput
from infc.runtime.server.connections import _BoundedProtocol, _Connection
from infc.runtime.server.encoding import TextFrame, encode, in_chunks
from infc.runtime.server.events import Events
from infc.runtime.server.streaming import EventStream, WholeAnswer

from .serving import Serving, serving
from .test_disconnect import LONG, send_raw


@given(st.text(), st.text(max_size=3))
def test_a_frame_is_filled_as_the_encoder_writes_it(text: str, name: str) -> None:
    def make(text: str) -> list[bytes]:
        return [b"data: ", encode({"model": name, "text": text, "logprobs": None}), b"\n\n"]

    assert TextFrame(make).filled(text) == b"".join(make(text))


@given(st.lists(st.binary(max_size=80_000), max_size=4))
def test_chunks_are_the_same_bytes(pieces: list[bytes]) -> None:
    chunks = list(in_chunks(pieces))
    assert b"".join(chunks) == b"".join(pieces)
    assert all(len(chunk) <= 1 << 17 for chunk in chunks)


HEADERS = st.sampled_from([[], [("content-length", "12")], [("transfer-encoding", "chunked")]])


@given(
    st.sampled_from(["GET", "HEAD", "POST"]),
    st.sampled_from(["1.0", "1.1"]),
    HEADERS,
    st.lists(st.binary(min_size=0, max_size=40), max_size=6),
)
def test_bodies_are_on_the_wire_as_h11_writes_them(
    method: str, version: str, headers: list[tuple[str, str]], parts: list[bytes]
) -> None:
    if headers and headers[0][0] == "content-length":
        headers = [("content-length", str(sum(map(len, parts))))]
    if method == "HEAD":
        parts = [b"" for _ in parts]  # as uvicorn has it
        headers = []
    written = []
    for kind in (_Connection, h11.Connection):
        connection = kind(h11.SERVER)
        connection.receive_data(f"{method} / HTTP/{version}\r\nHost: a\r\n\r\n".encode())
        while connection.next_event() is not h11.NEED_DATA and connection.their_state is h11.IDLE:
            pass
        events = [h11.Response(status_code=200, headers=headers), *map(h11.Data, parts)]
        sent = [connection.send(event) for event in [*events, h11.EndOfMessage()]]
        written.append((sent, connection.our_state))
    assert written[0] == written[1]


class FakeEvents:
    """Gives pieces one after the other, then the end or an error."""

    def __init__(self, *pieces: list[bytes] | Exception) -> None:
        self.left = list(pieces)
        self.closed = 0

    async def get(self) -> list[bytes]:
        await asyncio.sleep(0)
        if not self.left:
            return []
        first = self.left.pop(0)
        if isinstance(first, Exception):
            raise first
        return first

    def close(self) -> None:
        self.closed += 1


async def send_stream(events: FakeEvents, stall_seconds: float, waits: Sequence[float]) -> bytes:
    """What a client gets that takes so many seconds for each message."""
    body, left = b"", list(waits)

    async def send(message: Message) -> None:
        nonlocal body
        if left:
            await asyncio.sleep(left.pop(0))
        body += message.get("body", b"")

    first = await events.get()
    stream = EventStream(first, events, stall_seconds)  # type: ignore[arg-type]
    await stream({}, None, send)  # type: ignore[arg-type]
    return body


def test_a_client_has_time_for_each_message() -> None:
    events = FakeEvents([b"a"], [b"b"], [b"c", b"d"])
    body = asyncio.run(send_stream(events, 0.1, [0, 0.07, 0.07, 0.07, 0.07]))
    assert body == b"abcddata: [DONE]\n\n"
    assert events.closed == 1


@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_client_that_takes_too_long_for_one_is_cut_off(at: int) -> None:
    events = FakeEvents([b"a"], [b"b"], [b"c"])
    begun = time.monotonic()
    body = asyncio.run(send_stream(events, 0.1, [0, *[0.03] * (at - 1), 30.0]))
    assert body == b"abc"[: at - 1]
    assert 0.1 <= time.monotonic() - begun - 0.03 * (at - 1) < 1
    assert events.closed == 1


def test_waiting_for_the_engine_is_no_stall() -> None:
    class Slow(FakeEvents):
        async def get(self) -> list[bytes]:
            await asyncio.sleep(0.12)
            return await super().get()

    body = asyncio.run(send_stream(Slow([b"a"], [b"b"]), 0.05, []))
    assert body == b"abdata: [DONE]\n\n"


def test_a_whole_answer_is_not_sent_for_ever() -> None:
    async def run() -> float:
        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                await asyncio.sleep(30)

        begun = time.monotonic()
        await WholeAnswer([b"{}"], 0.1)({}, None, send)  # type: ignore[arg-type]
        return time.monotonic() - begun

    assert 0.1 <= asyncio.run(run()) < 1


def test_a_cancelled_stream_is_closed_and_stays_cancelled() -> None:
    events = FakeEvents([b"a"])

    async def run() -> None:
        task = asyncio.ensure_future(send_stream(events, 10, [0, 30.0]))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert events.closed == 1


def test_an_error_comes_behind_what_there_was() -> None:
    body = asyncio.run(send_stream(FakeEvents([b"a"], ValueError("odd")), 10, []))
    begin, _, rest = body.partition(b"data: ")
    assert begin == b"a"
    assert json.loads(rest.partition(b"\n\n")[0])["error"]["type"] == "server_error"
    assert body.endswith(b"data: [DONE]\n\n")


def chunks_of(text: str) -> list[dict[str, Any]]:
    """The events of a stream."""
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def test_where_nobody_is_behind_each_token_has_an_event(server: Serving) -> None:
    body = {**LONG, "max_tokens": 20, "stream": True, "return_token_ids": True}
    server.model.delay_seconds = 0.02
    try:
        chunks = chunks_of(server.post("/v1/completions", body).text)
    finally:
        server.model.delay_seconds = 0.0
    ids = [chunk["choices"][0]["token_ids"] for chunk in chunks]
    assert [len(each) for each in ids] == [1] * 20


@pytest.mark.parametrize("prompts", [["def f"], ["def f", "class A"]], ids=len)
def test_many_tokens_without_text_do_not_end_a_stream(server: Serving, prompts: list[str]) -> None:
    """Special tokens, which are left out: more outputs than are written at once."""
    odd = {"logit_bias": {"0": 100}, "ignore_eos": True, "max_tokens": 200}
    body = {**LONG, **odd, "prompt": prompts, "stream": True}
    body["stream_options"] = {"include_usage": True}
    *chunks, last = chunks_of(server.post("/v1/completions", body).text)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    ends = [choice for choice in choices if choice["finish_reason"] is not None]
    assert {choice["text"] for choice in choices} == {""}
    assert [end["finish_reason"] for end in ends] == ["length"] * len(prompts)
    assert last["usage"]["completion_tokens"] == 200 * len(prompts)


class Slow(Inbox):
    """Wakes its reader up late, as a busy loop does."""

    longest = 0

    def put(self, stream: Listener, item: Item) -> None:
        reader, self._reader = self._reader, None  # so that it is not asked before it wakes up
        super().put(stream, item)
        if reader is not None:
            wake = asyncio.get_running_loop().call_later
            wake(0.03, lambda: None if reader.done() else reader.set_result(None))
        Slow.longest = max(Slow.longest, len(self))


@pytest.mark.parametrize("extra", [{}, {"logprobs": 1}, {"return_token_ids": True}, {"n": 3}])
@pytest.mark.parametrize("prompts", [["def f"], ["def f", "class A"]], ids=len)
def test_what_lies_unread_comes_in_one_event(
    prompts: list[str], extra: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says the same: text, ids, log-probabilities and the end."""
    with serving() as server:
        body = {**LONG, "max_tokens": 60, "prompt": prompts, **extra}
        whole = server.post("/v1/completions", body).json()["choices"]
        server.model.delay_seconds = 0.002
        monkeypatch.setattr("infc.runtime.async_engine.Inbox", Slow)
        chunks = chunks_of(server.post("/v1/completions", {**body, "stream": True}).text)
    # An output of each prompt, and its end, which is never held back.
    assert 1 < Slow.longest <= 4
    assert len(chunks) < 0.5 * 60 * len(whole), "nothing was joined"
    for choice in whole:
        parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [p["finish_reason"] for p in parts] == [None] * (len(parts) - 1) + ["length"]
        if "return_token_ids" in extra:
            assert [i for part in parts for i in part["token_ids"]] == choice["token_ids"]
        if "logprobs" in extra:
            for name in ("tokens", "token_logprobs", "text_offset"):
                lists = [part["logprobs"][name] for part in parts if part["logprobs"]]
                assert [one for each in lists for one in each] == choice["logprobs"][name]


def unchunked(received: bytes) -> bytes:
    """The body of an answer as it came."""
    body, rest = b"", received.partition(b"\r\n\r\n")[2]
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body, rest = body + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return body


@pytest.mark.parametrize("num_prompts", [1, 8])
def test_a_client_that_reads_late_gets_everything_and_holds_up_nobody(
    num_prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine goes on: what nobody has read yet is kept once, and comes in few events."""
    made = _BoundedProtocol.connection_made

    def with_little_room(self: _BoundedProtocol, transport: asyncio.Transport) -> None:
        kernel = transport.get_extra_info("socket")
        kernel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(self, transport)
        transport.set_write_buffer_limits(high=4096)

    monkeypatch.setattr(_BoundedProtocol, "connection_made", with_little_room)
    with serving(stall_seconds=60) as server:
        body = {**LONG, "prompt": [f"a{i}" for i in range(num_prompts)], "max_tokens": 300}
        raw = send_raw(server.url, {**body, "stream": True})
        server.wait_until(lambda: server.engine.num_pending == num_prompts)
        neighbour = server.post("/v1/completions", {**LONG, "max_tokens": 20})
        assert neighbour.status_code == 200
        server.wait_until(lambda: server.engine.num_pending == 0)
        received = b""
        while not received.endswith(b"\r\n0\r\n\r\n"):
            received += raw.recv(1 << 20)
        raw.close()
        whole = server.post("/v1/completions", body).json()["choices"]
    chunks = chunks_of(unchunked(received).decode())
    texts = [""] * num_prompts
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        texts[choice["index"]] += choice["text"]
    assert texts == [choice["text"] for choice in whole]
    assert len(chunks) < 0.8 * 300 * num_prompts, "nothing lay unread"


@pytest.mark.parametrize("n", [1, 3])
def test_plain_events_are_written_without_waking_the_task(
    n: int, server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {"at once": 0, "by the task": 0}
    take, get = Events._take, Events.get

    def count_take(self: Events, number: int, output: RequestOutput) -> bool:
        taken = take(self, number, output)
        counts["at once"] += taken
        return taken

    async def count_get(self: Events) -> list[bytes]:
        counts["by the task"] += 1
        return await get(self)

    body = {**LONG, "max_tokens": 40, "n": n}
    texts = [choice["text"] for choice in server.post("/v1/completions", body).json()["choices"]]
    monkeypatch.setattr(Events, "_take", count_take)
    monkeypatch.setattr(Events, "get", count_get)
    server.model.delay_seconds = 0.005
    options = {"stream": True, "stream_options": {"include_usage": True}}
    try:
        chunks = chunks_of(server.post("/v1/completions", {**body, **options}).text)
    finally:
        server.model.delay_seconds = 0.0
    streamed = [""] * n
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        streamed[choice["index"]] += choice["text"]
    assert streamed == texts
    assert chunks[-1]["usage"]["completion_tokens"] == 40 * n
    assert counts["at once"] > 20
    assert counts["by the task"] < 12  # as it begins and ends, and where it was busy


@pytest.mark.parametrize("stream", [False, True])
def test_the_loop_is_woken_once_a_step_and_for_whole_answers_twice(
    stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    hand_over = async_streams.hand_over

    def count(items: Sequence[tuple[Listener, Item]]) -> list[Listener]:
        counts.append(len(items))
        return hand_over(items)

    monkeypatch.setattr("infc.runtime.async_engine.hand_over", count)
    with serving() as server:
        body = {**LONG, "prompt": ["a", "b", "c"], "max_tokens": 40, "stream": stream}
        assert server.post("/v1/completions", body).status_code == 200
        assert len(counts) <= server.engine.engine.num_steps
    assert sum(counts) > 6 if stream else sum(counts) == 6
