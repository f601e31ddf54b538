"""A request goes on in another engine: its choices, its neighbours, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from infc.ir.errors import CapacityError, InfcError, RequestError
from infc.runtime.async_engine import AsyncEngine
from infc.runtime.engine import Engine
from infc.runtime.executors.base import Executor, Running
from infc.runtime.requests.outputs import (
    CompletionOutput,
    RequestMetrics,
    RequestOutput,
    merge_outputs,
)
from infc.runtime.requests.resumption import ChoiceProgress, Progress, Resumption
from infc.runtime.sampling.sampling_params import SamplingParams
from infc.runtime.scheduling.step import Step
from infc.runtime.text.detokenizer import Detokenizer

from .executors import LateExecutor, MaskedLateExecutor, Wrapped
from .paged_model import PagedModel
from .resuming import (
    PROMPT,
    Script,
    byte_level,
    byte_tokens,
    dictated,
    engine_of,
    resumption,
    run,
    told,
)
from .samples import Grammar
from .test_text_decoders import tokenizer_of

# --- steps, choices, and neighbours ---------------------------------------------------------------

CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {"temperature": 1.0, "seed": None, "logprobs": 2},
    "choices": {"temperature": 1.0, "n": 3, "logprobs": 0, "stop_token_ids": [*range(0, 273, 9)]},
    "counts": {"temperature": 0.8, "repetition_penalty": 1.4, "frequency_penalty": 0.8, "n": 2},
    "prompt": {"prompt_logprobs": 1, "n": 2, "temperature": 1.0, "presence_penalty": 1.0},
    "grammar": {"temperature": 1.0, "n": 2, "min_tokens": 3, "stop_token_ids": [*range(0, 273, 5)]},
    "text": {"temperature": 1.0, "stop": ["a", "e"], "logprobs": 0, "n": 3},
    "best": {"temperature": 1.0, "best_of": 3, "seed": 4},
}


def ask(engine: Engine, case: str, name: str, resumed: Resumption | None = None) -> None:
    params = SamplingParams(**{"max_tokens": 12, "ignore_eos": True, "seed": 5, **CASES[case]})
    constraint = Grammar(engine.vocab_size, True) if case == "grammar" else None
    engine.add_request(name, PROMPT, params, constraint=constraint, resumed=resumed)


@cache
def expected(case: str) -> tuple[RequestOutput, ...]:
    engine = engine_of(tokenizer_of("llama"))
    ask(engine, case, case)
    return tuple(run(engine, case)[case])


@given(
    st.lists(st.tuples(st.sampled_from(sorted(CASES)), st.integers(1, 11)), max_size=6), st.data()
)
@settings(max_examples=80)
def test_whatever_goes_on_beside_it(cuts: list[tuple[str, int]], data: st.DataObject) -> None:
    """Other chunks, few blocks, steps in flight, and requests that begin anew."""
    depth, masks = data.draw(st.integers(0, 2)), data.draw(st.booleans())
    engine = engine_of(
        tokenizer_of("llama"),
        step_tokens=data.draw(st.integers(8, 40)),
        max_sequences=data.draw(st.integers(1, 8)),
        num_blocks=data.draw(st.sampled_from([8, 16, 80])),
    )
    if depth:
        late = MaskedLateExecutor if masks else LateExecutor
        engine.executor = late(engine.executor, depth)
    names = {}
    for place, (case, count) in enumerate(cuts):
        count = min(count, len(expected(case)) - 1)
        resumed = resumption(expected(case)[:count]) if count else None
        if count or case != "drawn":
            names[f"{case}.{place}"] = (case, count)
            ask(engine, case, f"{case}.{place}", resumed)
    for name, rest in run(engine, *names).items():
        case, count = names[name]
        assert told([*expected(case)[:count], *rest]) == told(expected(case)), name


def test_choices_that_ended_are_not_computed_and_the_prompt_once() -> None:
    parts = expected("choices")
    ends = [
        (piece.index, at)
        for at, p in enumerate(parts)
        for piece in p.outputs
        if piece.finish_reason
    ]
    first, at = ends[0]
    assert at + 1 < len(parts)
    resumed = resumption(parts[: at + 1])
    assert [choice.has_ended for choice in resumed.choices].count(True) == 1
    engine = engine_of(tokenizer_of("llama"), step_tokens=64)
    ask(engine, "choices", "r", resumed)
    going_on = engine.scheduler._requests["r"]
    assert [choice.choice for choice in going_on] == [i for i in range(3) if i != first]
    (rest,) = engine.step()
    assert {piece.index for piece in rest.outputs} <= {0, 1, 2} - {first}
    assert isinstance(engine.executor, PagedModel)
    num_told = sum(len(choice.token_ids) for choice in resumed.choices if not choice.has_ended)
    shared = len(PROMPT) // 4 * 4
    assert engine.executor.num_tokens <= 2 * len(PROMPT) - shared + num_told
    assert rest.metrics.first_token_time is not None
    assert rest.prompt_logprobs is None


def test_a_whole_answer_goes_on_behind_what_was_told() -> None:
    engine = engine_of(tokenizer_of("llama"))
    params = SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True)
    engine.add_request("r", PROMPT, params, whole=True)
    parts = run(engine, "r")["r"]
    assert len(parts) == 2
    engine.add_request("r", PROMPT, params, whole=True, resumed=resumption(parts[:1]))
    rest = run(engine, "r")["r"]
    assert len(rest) == 2
    assert told([parts[0], *rest]) == told(parts)


def test_the_prefix_salt_and_priority_are_those_of_the_request() -> None:
    engine = engine_of(tokenizer_of("llama"))
    resumed = resumption(expected("counts")[:3])
    params = SamplingParams(max_tokens=12, ignore_eos=True, seed=5, **CASES["counts"])
    engine.add_request("r", PROMPT, params, 3, cache_salt="s", resumed=resumed)
    for choice in engine.scheduler._requests["r"]:
        assert (choice.priority, choice.cache_salt) == (3, "s")


def first_ended() -> Resumption:
    """Of three choices, the first of which has ended."""
    resumed = resumption(expected("choices")[:1])
    ended = ChoiceProgress(token_ids=(0,), finish_reason="stop", stop_reason=0)
    going_on = ChoiceProgress(token_ids=(1,), num_characters=1, cumulative_logprob=-2.0)
    return replace(resumed, choices=(ended, going_on, going_on))


def test_a_request_that_is_resumed_waits_once_in_the_queue() -> None:
    """Whichever of its choices have ended."""
    for resumed in (first_ended(), resumption(expected("choices")[:1])):
        engine = engine_of(tokenizer_of("llama"), max_waiting=2)
        ask(engine, "choices", "a", resumed)
        ask(engine, "greedy", "b")
        with pytest.raises(CapacityError, match="2 requests already waiting"):
            ask(engine, "choices", "c", resumed)
        assert run(engine, "a", "b").keys() == {"a", "b"}


def test_a_choice_that_ended_elsewhere_is_not_told_again_where_the_others_fail(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(self: Detokenizer, token: int) -> str:
        raise MemoryError

    engine = engine_of(tokenizer_of("llama"))
    ask(engine, "choices", "r", first_ended())
    monkeypatch.setattr(Detokenizer, "push", fail)
    (last,) = run(engine, "r")["r"]
    assert last.finished and last.error == "the output of a request failed: MemoryError"
    assert [piece.index for piece in last.outputs] == [1, 2]


def test_a_resumed_request_can_be_aborted() -> None:
    engine = engine_of(tokenizer_of("llama"))
    ask(engine, "counts", "r", resumption(expected("counts")[:1]))
    last = engine.abort("r")
    assert last is not None and last.finished
    assert [piece.finish_reason for piece in last.outputs] == ["abort"] * 2
    assert not engine.has_unfinished


def test_from_one_async_engine_to_the_next() -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, n=2, logprobs=1)

    async def cut(served: AsyncEngine, count: int) -> list[RequestOutput]:
        parts = []
        async with aclosing(served.generate(PROMPT, params)) as stream:
            async for output in stream:
                parts.append(output)
                if len(parts) == count:
                    break
        return parts

    async def go_on(served: AsyncEngine, resumed: Resumption) -> list[RequestOutput]:
        return [output async for output in served.generate(PROMPT, params, resumed=resumed)]

    async def test(first: AsyncEngine, second: AsyncEngine) -> None:
        parts = await cut(first, 1)  # later ones may be all that is left, joined
        rest = await go_on(second, resumption(parts))
        seed = parts[0].seed
        whole = [o async for o in first.generate(PROMPT, replace(params, seed=seed))]
        assert merge_outputs([*parts, *rest]).outputs == merge_outputs(whole).outputs

    engines = [AsyncEngine(engine_of(tokenizer_of("llama"), step_tokens=s)) for s in (16, 9)]
    try:
        asyncio.run(asyncio.wait_for(test(*engines), 30))
    finally:
        for served in engines:
            served.shutdown()


class FailsLater(Wrapped):
    """Fails once, at the launch of that number."""

    def __init__(self, inner: Executor, number: int) -> None:
        super().__init__(inner)
        self.left = number

    def launch(self, step: Step) -> Running:
        self.left -= 1
        if self.left == 0:
            raise InfcError("the step failed")
        return super().launch(step)


@pytest.mark.parametrize("number", [2, 5, 9])
def test_behind_a_step_that_failed(number: int) -> None:
    """What was told before the error is all that counts, however it was joined."""
    engine = engine_of(tokenizer_of("llama"))
    engine.executor = FailsLater(engine.executor, number)
    served = AsyncEngine(engine)
    params = SamplingParams(max_tokens=12, ignore_eos=True, seed=5, **CASES["choices"])
    parts: list[RequestOutput] = []

    async def read(resumed: Resumption | None) -> None:
        async for output in served.generate(PROMPT, params, resumed=resumed):
            parts.append(output)
            await asyncio.sleep(0.002)  # slower than the engine

    try:
        with pytest.raises(InfcError, match="the step failed"):
            asyncio.run(asyncio.wait_for(read(None), 30))
        assert sum(len(p.token_ids) for part in parts for p in part.outputs) >= number - 1
        asyncio.run(asyncio.wait_for(read(resumption(parts)), 30))
    finally:
        served.shutdown()
    assert told(parts) == told(expected("choices"))


# --- what was told --------------------------------------------------------------------------------


def test_nothing_told_and_all_told() -> None:
    assert Progress().resumption() is None
    progress = Progress(expected("greedy"))
    assert progress.finished
    with pytest.raises(RequestError, match="the answer is complete"):
        progress.resumption()


def test_an_abort_is_no_progress() -> None:
    engine = engine_of(tokenizer_of("llama"))
    ask(engine, "choices", "r")
    progress = Progress(engine.step())
    before = progress.resumption()
    last = engine.abort("r")
    assert last is not None
    with pytest.raises(RequestError, match="'r' was aborted"):
        progress.add(last)
    assert progress.resumption() == before and not progress.finished


def test_a_choice_that_failed_has_ended() -> None:
    class Fails(Script):
        def mask(self, output_ids: Sequence[int]) -> NDArray[np.bool_]:
            if len(output_ids) == 2:
                raise ValueError("no way on")
            return super().mask(output_ids)

        def fork(self) -> Script:
            return Script(self.token_ids, self.vocab_size)

    ids = byte_tokens("abcd")
    engine = engine_of(byte_level())
    params = SamplingParams(max_tokens=4, ignore_eos=True, n=2)
    engine.add_request("r", PROMPT, params, constraint=Fails(ids, engine.vocab_size))
    parts = run(engine, "r")["r"]
    resumed = resumption(parts[:3])
    assert [choice.finish_reason for choice in resumed.choices] == ["error", None]
    engine.add_request(
        "r", PROMPT, params, constraint=Fails(ids, engine.vocab_size), resumed=resumed
    )
    assert told([*parts[:3], *run(engine, "r")["r"]]) == told(parts)


# --- refusals -------------------------------------------------------------------------------------

FIELDS: dict[str, Any] = {"max_tokens": 4, "n": 2, "seed": 7, "stop": "ab", "stop_token_ids": [5]}
GOOD = Resumption(
    seed=7,
    choices=(
        ChoiceProgress(token_ids=(1 + 0x63, 1 + 0x61), num_characters=1),
        ChoiceProgress(token_ids=(9, 5), finish_reason="stop", stop_reason=5),
    ),
)


def changed(index: int, **fields: Any) -> Callable[[], Resumption]:
    def change() -> Resumption:
        choices = list(GOOD.choices)
        choices[index] = replace(choices[index], **fields)
        return replace(GOOD, choices=tuple(choices))

    return change


REFUSED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "choice 0: 9999 is not a token id, expected 0..272": (changed(0, token_ids=(9999,)), {}),
    "choice 0: -1 is not a token id, expected 0..272": (changed(0, token_ids=(-1,)), {}),
    "choice 1: it has 5 tokens, and may have 4": (changed(1, token_ids=(9,) * 5), {}),
    "choice 0: it has all of the 4 tokens that it may have, and did not end": (
        changed(0, token_ids=(9,) * 4),
        {},
    ),
    "choice 1: token 5 at place 0 ended it": (changed(1, token_ids=(5, 9)), {}),
    "choice 0: token 5 at place 1 ended it": (changed(0, token_ids=(9, 5)), {}),
    "choice 0: the stop string 'ab' ended it": (
        changed(0, token_ids=(1 + 0x61, 1 + 0x62)),
        {},
    ),
    "choice 1: the stop string 'ab' ended it": (
        changed(1, token_ids=(1 + 0x61, 1 + 0x62, 9), finish_reason="length", stop_reason=None),
        {},
    ),
    "choice 0: its tokens have 1 characters of text, and 2 were told": (
        changed(0, num_characters=2),
        {},
    ),
    "choice 0: it has no token, but other tokens of the request were told": (
        changed(0, token_ids=()),
        {},
    ),
    "choice 0: it has no cumulative_logprob, and the request asks for log-probabilities": (
        lambda: GOOD,
        {"logprobs": 0},
    ),
    "it has 2 choices, and the request 3": (lambda: GOOD, {"n": 3}),
    "its seed is 7, and that of the request 8": (lambda: GOOD, {"seed": 8}),
    "every choice has ended, nothing is left to continue": (
        changed(0, finish_reason="length"),
        {},
    ),
    "a request with best_of tells nothing before its end": (lambda: GOOD, {"n": 1, "best_of": 2}),
    "a request without tokens tells nothing before its end": (
        lambda: GOOD,
        {"max_tokens": 0, "prompt_logprobs": 0, "n": 1},
    ),
    "it must be a Resumption, not dict": (GOOD.as_data, {}),
    "seed is -1, expected 0..2**64-1": (lambda: replace(GOOD, seed=-1), {}),
    "seed is 'x', not of type int": (lambda: replace(GOOD, seed="x"), {}),  # type: ignore[arg-type]
    "finish_reason is 'abort', not one of stop, length, error": (
        changed(1, finish_reason="abort"),
        {},
    ),
    "token_ids is '12', not a list": (changed(0, token_ids="12"), {}),
    "True is not a token id": (changed(0, token_ids=(True,)), {}),
    "num_characters is None, not of type int": (changed(0, num_characters=None), {}),
    "Resumption has the keys choices, seed": (lambda: Resumption.from_data({"seed": 1}), {}),
    "ChoiceProgress has the keys": (
        lambda: Resumption.from_data({"seed": 1, "choices": [{"token_ids": [1], "more": 2}]}),
        {},
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_have_been_told_is_refused(message: str) -> None:
    make, fields = REFUSED[message]
    engine = engine_of(tokenizer_of("llama"))
    params = SamplingParams(**{**FIELDS, **fields})
    with pytest.raises(RequestError) as caught:
        engine.add_request("r", PROMPT, params, resumed=make())
    assert caught.value.message.startswith(f"the request cannot be resumed: {message}")
    assert caught.value.field == "resumed"
    assert not engine.has_unfinished and not engine.knows("r")


def test_what_was_told_is_continued() -> None:
    """The base of the refusals is right."""
    engine = engine_of(tokenizer_of("llama"))
    engine.add_request("r", PROMPT, SamplingParams(**FIELDS), resumed=GOOD)
    assert merge_outputs(run(engine, "r")["r"]).outputs[0].index == 0


def test_tokens_that_the_constraint_does_not_allow_are_refused() -> None:
    ids = byte_tokens("abcd")
    parts = dictated(byte_level(), ids, {})
    with pytest.raises(
        RequestError, match=r"the constraint Script does not allow token \d+ at place 1"
    ):
        dictated(byte_level(), byte_tokens("axcd"), {}, resumption(parts[:2]))


def test_progress_goes_on_behind_a_resumption() -> None:
    """What is told of a request that another engine continues, and that one more may continue."""
    ended = ChoiceProgress(token_ids=(1,), num_characters=2, finish_reason="stop", stop_reason=7)
    going_on = ChoiceProgress(token_ids=(1, 2), num_characters=3, cumulative_logprob=-0.5)
    resumed = Resumption(seed=3, choices=(ended, going_on))
    progress = Progress.of(resumed)
    assert progress.resumption() == resumed
    piece = CompletionOutput(index=1, token_ids=(4,), text="xy", cumulative_logprob=-1.5)
    progress.add(
        RequestOutput(
            request_id="a",
            prompt_token_ids=(9,),
            outputs=(piece,),
            metrics=RequestMetrics(arrival_time=0.0),
        )
    )
    more = ChoiceProgress(token_ids=(1, 2, 4), num_characters=5, cumulative_logprob=-1.5)
    assert progress.resumption() == Resumption(seed=3, choices=(ended, more))
