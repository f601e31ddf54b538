"""Answers that end in an error: what there was by then comes before it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from infc.runtime.async_streams import Inbox, Item, Listener
from infc.runtime.executors.base import Finished
from infc.runtime.scheduling.step import Step
from infc.runtime.server.encoding import TextFrame
from infc.runtime.server.usage import Usage

from .serving import Serving, serving
from .test_disconnect import LONG
from .test_errors import refusal
from .test_streaming import chunks_of

BODY: dict[str, Any] = {
    **LONG,
    "max_tokens": 100,
    "temperature": 1.0,
    "seed": 7,
    "return_token_ids": True,
}
PROMPTS = ["def f", ["def f", "class A"]]


def read_late(server: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, nobody reads anything before all requests have ended."""
    get = Inbox.get

    async def get_late(self: Inbox) -> tuple[Listener, Item]:
        while server.engine.num_pending:
            await asyncio.sleep(0.005)
        return await get(self)

    monkeypatch.setattr(Inbox, "get", get_late)


@contextmanager
def too_slow(delay_seconds: float, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    """A server whose answers take longer than they may, and that nobody reads before they end."""
    with serving(request_seconds=0.6) as slow:
        slow.model.delay_seconds = delay_seconds
        read_late(slow, monkeypatch)
        yield slow


def stream(server: Serving, body: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Choices of a stream, each joined from its chunks, and the error behind them."""
    chunks = chunks_of(server.post("/v1/completions", {**body, "stream": True}).text)
    choices: dict[int, dict[str, Any]] = {}
    for part in (part for chunk in chunks[:-1] for part in chunk["choices"]):
        whole = choices.setdefault(part["index"], {"text": "", "token_ids": []})
        whole["text"] += part["text"]
        whole["token_ids"] += part["token_ids"]
        assert "finish_reason" not in whole, "it had ended"
        if part["finish_reason"] is not None:
            whole["finish_reason"] = part["finish_reason"]
    return [choices[index] for index in sorted(choices)], chunks[-1]["error"]


def check_begins(choices: list[dict[str, Any]], wholes: list[dict[str, Any]], least: int) -> None:
    """Each has more than a token or two of the whole one, and the text of nearly as many."""
    for choice, whole in zip(choices, wholes, strict=True):
        ids = choice["token_ids"]
        assert len(ids) >= least
        assert ids == whole["token_ids"][: len(ids)]
        assert choice["text"] and whole["text"].startswith(choice["text"])
        if "finish_reason" in choice:
            assert choice == {key: whole[key] for key in choice}


@pytest.mark.parametrize("prompt", PROMPTS, ids=type)
@pytest.mark.parametrize("n", [1, 2])
def test_an_answer_that_takes_too_long_has_what_lay_unread(
    prompt: object, n: int, server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {**BODY, "prompt": prompt, "n": n}
    wholes = server.post("/v1/completions", body).json()["choices"]
    with too_slow(0.02, monkeypatch) as slow:
        choices, error = stream(slow, body)
        assert error["code"] == "timeout"
        check_begins(choices, wholes, 4)
        assert refusal(slow.post("/v1/completions", body), 504)["code"] == "timeout"
        slow.wait_until_empty()


def test_a_choice_that_ended_beside_one_that_takes_too_long(
    server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {**BODY, "n": 2}
    first, second = (c["token_ids"] for c in server.post("/v1/completions", body).json()["choices"])
    body["stop_token_ids"] = [next(token for token in first[4:] if token not in second)]
    wholes = server.post("/v1/completions", body).json()["choices"]
    assert [whole["finish_reason"] for whole in wholes] == ["stop", "length"]
    with too_slow(0.01, monkeypatch) as slow:
        choices, error = stream(slow, body)
    assert error["code"] == "timeout"
    check_begins(choices, wholes, 4)
    assert [choice.get("finish_reason") for choice in choices] == ["stop", None]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    ("fault", "code"),
    [(MemoryError("secret"), "generation_failed"), (RuntimeError("secret"), "engine_stopped")],
)
@pytest.mark.parametrize("prompt", PROMPTS, ids=type)
def test_a_step_that_fails_has_what_lay_unread_before_it(
    prompt: object,
    fault: Exception,
    code: str,
    n: int,
    server: Serving,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    body = {**BODY, "prompt": prompt, "n": n, "max_tokens": 60}
    wholes = server.post("/v1/completions", body).json()["choices"]
    with serving() as failing:
        launch, left = failing.model.launch, 10

        def fail(step: Step) -> Finished:
            nonlocal left
            left -= 1
            if left == 0:
                raise fault
            return launch(step)

        monkeypatch.setattr(failing.model, "launch", fail)
        read_late(failing, monkeypatch)
        choices, error = stream(failing, body)
        assert error["code"] == code
        check_begins(choices, wholes, 9)
        left = 10
        refusal(failing.post("/v1/completions", body), 500 if code == "generation_failed" else 503)


@pytest.mark.parametrize(("owner", "attribute"), [(Usage, "add"), (TextFrame, "filled")])
def test_what_cannot_be_sent_at_once_is_sent_and_counted_once(
    owner: type, attribute: str, server: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Be it that it could not be counted, or not be written."""
    body = {
        **BODY,
        "prompt": "def f",
        "return_token_ids": False,
        "stream_options": {"include_usage": True},
        "stream": True,
    }
    whole = chunks_of(server.post("/v1/completions", body).text)
    sinks, function, is_sinking, failed = Inbox._sinks, getattr(owner, attribute), False, 0

    def sinks_noted(self: Inbox, stream: Listener, item: Item) -> bool:
        nonlocal is_sinking
        is_sinking = True
        try:
            return sinks(self, stream, item)
        finally:
            is_sinking = False

    def fail(self: Any, *arguments: Any) -> Any:
        nonlocal failed
        if is_sinking:
            failed += 1
            if failed % 2:
                raise MemoryError
        return function(self, *arguments)

    monkeypatch.setattr(Inbox, "_sinks", sinks_noted)
    monkeypatch.setattr(owner, attribute, fail)
    chunks = chunks_of(server.post("/v1/completions", body).text)
    assert failed
    assert text_of(chunks) == text_of(whole)
    assert chunks[-1]["usage"] == whole[-1]["usage"]


def text_of(chunks: list[dict[str, Any]]) -> str:
    """The text of the only choice of a stream."""
    return "".join(part["text"] for chunk in chunks for part in chunk["choices"])
