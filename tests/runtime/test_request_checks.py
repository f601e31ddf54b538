"""What is refused before a request is queued: ids that are none, and parameters that contradict."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.ir.errors import RequestError
from infc.runtime import engine
from infc.runtime.async_engine import AsyncEngine
from infc.runtime.requests import lengths
from infc.runtime.requests.outputs import merge_outputs
from infc.runtime.requests.request_checks import (
    CheckedIds,
    check_choosable,
    check_params,
    checked_ids,
)
from infc.runtime.sampling import logits_adjuster
from infc.runtime.sampling.sampling_params import SamplingParams

from .engines import make_engine

VOCAB = 12
EOS = (0, 2)


def check(**params: Any) -> None:
    checked = SamplingParams(**params)
    check_params(checked, vocab_size=VOCAB, has_tokenizer=True)
    eos = () if checked.ignore_eos else EOS
    check_choosable(checked, (*checked.stop_token_ids, *eos), vocab_size=VOCAB)


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "only ends": ({"allowed_token_ids": [0, 2], "min_tokens": 3}, "allowed_token_ids"),
    "only its own ends": (
        {"allowed_token_ids": [7], "stop_token_ids": [7], "min_tokens": 1},
        "allowed_token_ids",
    ),
    "an end and what is banned": (
        {
            "allowed_token_ids": [7, 8],
            "stop_token_ids": [7],
            "banned_token_ids": [8],
            "min_tokens": 1,
        },
        "allowed_token_ids",
    ),
    "all banned": ({"banned_token_ids": list(range(VOCAB))}, "banned_token_ids"),
    "all banned but ends": (
        {"banned_token_ids": [1, *range(3, VOCAB)], "min_tokens": 1},
        "banned_token_ids",
    ),
    "all ends": (
        {"stop_token_ids": list(range(VOCAB)), "min_tokens": 1, "ignore_eos": True},
        "stop_token_ids",
    ),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_parameters_that_leave_no_token(name: str) -> None:
    params, field = CONTRADICTIONS[name]
    with pytest.raises(RequestError) as caught:
        check(**params)
    assert caught.value.field == field
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    "params",
    [
        {"allowed_token_ids": [0, 2]},
        {"allowed_token_ids": [0, 2], "min_tokens": 3, "ignore_eos": True},
        {"allowed_token_ids": [0, 7], "min_tokens": 3},
        {"banned_token_ids": [1, *range(3, VOCAB)]},
        {"stop_token_ids": list(range(VOCAB))},
        {"logit_bias": dict.fromkeys(range(VOCAB), -100)},
    ],
)
def test_parameters_that_leave_one(params: dict[str, Any]) -> None:
    try:
        check(**params)
    except RequestError as error:
        pytest.fail(f"refused: {error}")


@given(st.data())
def test_a_choice_is_refused_exactly_where_there_is_none(data: st.DataObject) -> None:
    ids = st.lists(st.integers(0, VOCAB - 1), max_size=VOCAB, unique=True)
    allowed, banned, stops = data.draw(st.none() | ids), data.draw(ids), data.draw(ids)
    least, ignore = data.draw(st.integers(0, 1)), data.draw(st.booleans())
    left = set(range(VOCAB) if allowed is None else allowed) - set(banned)
    if least:
        left -= {*stops, *(() if ignore else EOS)}
    try:
        check(
            allowed_token_ids=allowed,
            banned_token_ids=banned,
            stop_token_ids=stops,
            min_tokens=least,
            ignore_eos=ignore,
        )
        assert left
    except RequestError:
        assert not left


@pytest.mark.parametrize("wrong", [-1, VOCAB, True, 1.0, None, "1"])
def test_what_is_no_token_id_is_named(wrong: Any) -> None:
    with pytest.raises(RequestError, match=r"is not a token id, expected 0\.\.11") as caught:
        checked_ids([1, 2, wrong, 3], VOCAB)
    assert caught.value.field == "prompt"
    assert repr(wrong) in str(caught.value)


def test_ids_are_checked_once() -> None:
    ids = checked_ids([1, 2, 3], VOCAB)
    assert ids == [1, 2, 3] and checked_ids(ids, VOCAB) is ids
    with pytest.raises(RequestError):  # they may be none of another vocabulary
        checked_ids(CheckedIds([11], VOCAB), 11)


def test_an_end_outside_the_vocabulary_is_none() -> None:
    from infc.runtime.text.tokenizer import Tokenizer

    from .small_artifact import make_tokenizer

    tokenizer = Tokenizer(make_tokenizer(), eos_token_ids=(0, 10**6))
    served = make_engine(tokenizer.backend.get_vocab_size(), tokenizer)
    served.add_request("r", [5, 6], SamplingParams(max_tokens=3, min_tokens=3))
    parts = []
    while served.has_unfinished:
        parts += served.step()
    assert merge_outputs(parts).outputs[0].finish_reason == "length"


def test_requests_are_built_once_and_not_on_the_engines_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Arrays, checks and text of all choices: the thread only queues what is there."""
    import threading

    seen: list[tuple[str, str]] = []

    def spy(owner: Any, name: str) -> None:
        whole = getattr(owner, name)

        def call(*arguments: Any, **options: Any) -> Any:
            seen.append((name, threading.current_thread().name))
            return whole(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    spy(logits_adjuster._Edits, "__init__")
    spy(logits_adjuster._Edits, "take_prompt")
    spy(engine, "check_params")
    spy(engine, "Request")
    spy(engine, "RequestStream")
    monkeypatch.setattr(lengths, "_LONG", 20)
    served = AsyncEngine(make_engine(50))
    bias = dict.fromkeys(range(40), 1.0)
    params = SamplingParams(max_tokens=2, n=5, logit_bias=bias, repetition_penalty=1.5)

    async def ask() -> None:
        outputs = [output async for output in served.generate([1, 2, 3], params)]
        assert len(merge_outputs(outputs).outputs) == 5

    asyncio.run(ask())
    served.shutdown()
    names = [name for name, _ in seen]
    assert sorted(names) == sorted(set(names)), "something was built twice"
    assert len(names) == 5
    assert not any(thread.startswith(("infc-engine", "MainThread")) for _, thread in seen)
