"""What steps add to a request adds up to the same, however much of it is told at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infc.runtime.requests.outputs import CompletionOutput, RequestOutput, merge_outputs
from infc.runtime.requests.request_stream import RequestStream, _Choice
from infc.runtime.sampling.sampling_params import SamplingParams
from infc.runtime.scheduling.owners import PlannedStep, StepOwners
from infc.runtime.scheduling.step_results import StepResults
from infc.runtime.text.detokenizer import Detokenizer
from infc.runtime.text.tokenizer import Tokenizer

from .engines import make_engine
from .test_text_decoders import as_sentencepiece

PROMPT = [3, 4, 5, 6, 7]
BASE: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 20, "ignore_eos": True}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "text": {"stop": ["zzz", "e"], "logprobs": 1},
    "choices": {"n": 3, "logprobs": 0, "stop_token_ids": [*range(0, 273, 9)]},
    "prompt": {"prompt_logprobs": 1, "n": 2},
    "best": {"n": 2, "best_of": 3},
    "one": {"max_tokens": 1},
    "none": {"max_tokens": 0, "prompt_logprobs": 0},
}


@cache
def tokenizer() -> Tokenizer:
    """Half of its tokens are bytes, so that text is held back."""
    return as_sentencepiece(1)


def parts_of(
    name: str, is_wanted: Callable[[], bool] | None = None, *, whole: bool = False
) -> list[RequestOutput]:
    """Every output of a case; `is_wanted` is asked before each step."""
    engine = make_engine(tokenizer().backend.get_vocab_size(), tokenizer())
    params = SamplingParams(**{**BASE, **CASES[name]})
    engine.add_request("r", PROMPT, params, whole=whole)
    stream, parts = engine._publisher.streams["r"], []
    while engine.has_unfinished:
        if is_wanted is not None and not stream.tells_at_end:
            stream.is_wanted = is_wanted()
        parts += engine.step()
    return parts


@cache
def expected(name: str) -> tuple[RequestOutput, ...]:
    return tuple(parts_of(name))


def told(whole: RequestOutput) -> tuple[object, ...]:
    """All of an answer but its times."""
    return whole.outputs, whole.prompt_token_ids, whole.prompt_logprobs, whole.finished, whole.error


@given(st.sampled_from(sorted(CASES)), st.data())
@settings(max_examples=60)
def test_what_is_told_together_is_what_was_told_step_by_step(
    name: str, data: st.DataObject
) -> None:
    pattern = data.draw(st.lists(st.booleans(), min_size=1, max_size=8))
    turns = 0

    def is_wanted() -> bool:
        nonlocal turns
        turns += 1
        return pattern[turns % len(pattern)]

    parts = parts_of(name, is_wanted)
    assert told(merge_outputs(parts)) == told(merge_outputs(expected(name)))
    assert [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]
    if not any(pattern):
        assert len(parts) == 1
    if all(pattern):
        assert [told(part) for part in parts] == [told(part) for part in expected(name)]


@pytest.mark.parametrize("name", CASES)
def test_a_whole_answer_is_told_as_it_begins_and_as_it_ends(name: str) -> None:
    parts = parts_of(name, whole=True)
    assert told(merge_outputs(parts)) == told(merge_outputs(expected(name)))
    assert len(parts) == min(2, len(expected(name)))
    assert parts[0].metrics.first_scheduled_time is not None
    if len(parts) == 2:
        assert all(len(each.token_ids) == 1 for each in parts[0].outputs)


@pytest.mark.parametrize("name", CASES)
def test_every_output_has_the_seed(name: str) -> None:
    seed = None if name == "none" else BASE["seed"]
    assert {part.seed for part in expected(name)} == {seed}


def test_a_seed_that_was_drawn_gives_the_same_again() -> None:
    engine = make_engine(tokenizer().backend.get_vocab_size(), tokenizer())
    params = SamplingParams(temperature=1.0, max_tokens=9, ignore_eos=True)
    answers: list[RequestOutput] = []
    for chosen in (None, -1):
        engine.add_request("r", PROMPT, replace(params, seed=chosen))
        while engine.has_unfinished:
            answers += engine.step()
        again = answers[-1].seed
        assert again is not None
        first = merge_outputs([answer for answer in answers if answer.seed == again])
        engine.add_request("r", PROMPT, replace(params, seed=again))
        second: list[RequestOutput] = []
        while engine.has_unfinished:
            second += engine.step()
        assert merge_outputs(second).outputs == first.outputs
    assert again == 2**64 - 1


def test_who_reads_again_is_told_also_where_a_step_gave_nothing() -> None:
    """As to one that was preempted."""
    engine = make_engine(tokenizer().backend.get_vocab_size(), tokenizer())
    engine.add_request("r", PROMPT, SamplingParams(**BASE))
    publisher = engine._publisher
    nothing: Any = PlannedStep(None, StepOwners(requests=())), StepResults([], [])  # type: ignore[arg-type]
    (first,) = engine.step()
    stream = publisher.streams["r"]
    stream.is_wanted = False
    assert engine.step() == engine.step() == []
    assert publisher.publish(*nothing) == []
    stream.want()
    (late,) = publisher.publish(*nothing)
    assert publisher.publish(*nothing) == []
    begin = merge_outputs(expected("plain")).outputs[0].token_ids
    assert first.outputs[0].token_ids + late.outputs[0].token_ids == begin[:3]
    assert not late.finished and not engine.step()[0].finished


@pytest.mark.parametrize("is_wanted", [True, False])
def test_a_request_that_fails_has_what_was_there(
    is_wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    push, left = Detokenizer.push, 6

    def fail(self: Detokenizer, token: int) -> str:
        nonlocal left
        left -= 1
        if left == 0:
            raise MemoryError
        return push(self, token)

    monkeypatch.setattr(Detokenizer, "push", fail)
    parts = parts_of("plain", lambda: is_wanted)
    answer, right = merge_outputs(parts), merge_outputs(expected("plain")).outputs[0]
    (only,) = answer.outputs
    assert (only.finish_reason, answer.finished) == ("error", True)
    assert answer.error == "the output of a request failed: MemoryError"
    assert only.token_ids == right.token_ids[:5] and right.text.startswith(only.text)
    assert len(parts) == (6 if is_wanted else 1)


def test_choices_that_ended_before_another_failed_are_told_as_they_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = {part.index: part for part in merge_outputs(expected("choices")).outputs}
    lengths = {index: len(part.token_ids) for index, part in right.items()}
    assert len(set(lengths.values())) > 1
    push, last = Detokenizer.push, max(lengths.values())
    counts: dict[int, int] = {}

    def fail(self: Detokenizer, token: int) -> str:
        counts[id(self)] = counts.get(id(self), 0) + 1
        if counts[id(self)] == last - 1:
            raise MemoryError
        return push(self, token)

    monkeypatch.setattr(Detokenizer, "push", fail)
    for is_wanted in (True, False):
        counts.clear()
        answer = merge_outputs(parts_of("choices", lambda wanted=is_wanted: wanted))  # type: ignore[misc]
        ended: list[CompletionOutput] = []
        for part in answer.outputs:
            if part.finish_reason != "error":
                ended.append(part)
                assert part == right[part.index]
        assert len(ended) == sum(length < last - 1 for length in lengths.values())


def test_the_text_of_a_long_answer_is_found_on_the_way() -> None:
    """Not all at once as it ends, for which all others would wait."""
    longest, pushed = 0, 0
    push = Detokenizer.push

    def count(self: Detokenizer, token: int) -> str:
        nonlocal pushed
        pushed += 1
        return push(self, token)

    size = tokenizer().backend.get_vocab_size()
    engine = make_engine(size, tokenizer(), max_context=512, num_blocks=200)
    params = SamplingParams(**{**BASE, "max_tokens": 400})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Detokenizer, "push", count)
        engine.add_request("r", PROMPT, params, whole=True)
        parts = []
        while engine.has_unfinished:
            before = pushed
            parts += engine.step()
            longest = max(longest, pushed - before)
    assert len(merge_outputs(parts).outputs[0].token_ids) == pushed == 400
    assert 1 < longest <= 65


def test_of_a_request_that_failed_amid_a_token_nothing_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even where that could not be told: finding its text again would repeat a part of it."""
    push, left = Detokenizer.push, 6

    def fail(self: Detokenizer, token: int) -> str:
        nonlocal left
        left -= 1
        text = push(self, token)
        if left == 0:
            raise MemoryError
        return text

    def fail_too(self: RequestStream, error: str) -> RequestOutput:
        raise MemoryError

    monkeypatch.setattr(Detokenizer, "push", fail)
    monkeypatch.setattr(RequestStream, "failure", fail_too)
    engine = make_engine(tokenizer().backend.get_vocab_size(), tokenizer())
    engine.add_request("r", PROMPT, SamplingParams(**BASE))
    stream = engine._publisher.streams["r"]

    def run() -> None:
        while engine.has_unfinished:
            stream.is_wanted = False
            engine.step()

    with pytest.raises(MemoryError):
        run()
    assert stream.has_news and stream.untold() is None


class FailsFor:
    """A function of a stream that fails for one request, from its call of number `first` on."""

    def __init__(self, function: Callable[..., Any], first: int) -> None:
        self.function, self.left = function, first

    def __call__(self, stream: RequestStream, *arguments: Any) -> Any:
        if stream.request.request_id == "bad":
            self.left -= 1
            if self.left <= 0:
                raise ValueError("odd")
        return self.function(stream, *arguments)


@pytest.mark.parametrize(
    ("attribute", "case", "is_wanted", "first"),
    [
        ("keep", "plain", False, 4),
        ("keep", "choices", True, 2),  # one of its choices is to be told then
        ("has_news", "plain", False, 2),
        ("add_prompt_logprobs", "prompt", True, 1),
    ],
)
def test_a_fault_beside_the_text_ends_its_request_alone(
    attribute: str, case: str, is_wanted: bool, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = getattr(RequestStream, attribute)
    fails = FailsFor(whole.fget if attribute == "has_news" else whole, first)
    replaced = property(fails) if attribute == "has_news" else lambda *given: fails(*given)
    monkeypatch.setattr(RequestStream, attribute, replaced)
    engine = make_engine(tokenizer().backend.get_vocab_size(), tokenizer())
    engine.add_request("bad", PROMPT, SamplingParams(**{**BASE, **CASES[case]}))
    engine.add_request("good", PROMPT, SamplingParams(**BASE))
    bad, parts = engine._publisher.streams["bad"], list[RequestOutput]()
    while engine.has_unfinished:
        bad.is_wanted = is_wanted
        parts += engine.step()
    assert fails.left <= 0 and not engine._publisher.streams
    answers = {n: merge_outputs([p for p in parts if p.request_id == n]) for n in ("bad", "good")}
    assert answers["bad"].error == "the output of a request failed: ValueError"
    assert answers["bad"].finished
    assert {part.finish_reason for part in answers["bad"].outputs} == {"error"}
    assert answers["good"].outputs == merge_outputs(expected("plain")).outputs
    engine.scheduler.check()


@pytest.mark.parametrize("case", ["plain", "choices", "best"])
def test_an_output_that_is_lost_as_it_has_been_made_is_no_whole_answer(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the last one: with the others alone, it would lack its end and look complete."""
    told = _Choice.told

    def fail(self: _Choice) -> None:
        told(self)
        if self.is_over and self.request.choice == last:
            raise MemoryError

    lengths = {part.index: len(part.token_ids) for part in merge_outputs(expected(case)).outputs}
    last = max(lengths, key=lambda index: lengths[index]) if case == "choices" else 0
    monkeypatch.setattr(_Choice, "told", fail)
    parts = parts_of(case)
    answer = merge_outputs(parts)
    assert answer.finished and answer.error == "the output of a request failed: MemoryError"
    assert [part.finished for part in parts] == [False] * (len(parts) - 1) + [True]
    right = {part.index: part for part in merge_outputs(expected(case)).outputs}
    for part in answer.outputs:
        if part.finish_reason != "error":
            assert part == right[part.index]
    assert any(part.finish_reason == "error" for part in answer.outputs)
    ends = [piece.index for part in parts for piece in part.outputs if piece.finish_reason]
    assert sorted(ends) == sorted(right)
