"""Several choices, the best of them, and the log-probabilities of a prompt, through the engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from infc.ir.errors import RequestError
from infc.runtime.api.llm import LLM
from infc.runtime.engine import Engine
from infc.runtime.executors.base import Running
from infc.runtime.options import RuntimeOptions
from infc.runtime.requests.outputs import CompletionOutput, RequestOutput, merge_outputs
from infc.runtime.requests.request import Request
from infc.runtime.sampling.sampling_params import SamplingParams
from infc.runtime.scheduling.step import Step

from .executors import Wrapped, owners_in_flight
from .small_artifact import write_small_artifact

PROMPT = "the hat sat on the mat and the cat"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_artifact(tmp_path_factory.mktemp("choices") / "small")


@pytest.fixture(scope="module")
def engine(artifact: Path) -> Engine:
    return Engine.open(artifact)


def run(engine: Engine, prompt: str | Sequence[int] = PROMPT, **params: Any) -> RequestOutput:
    """The whole answer to one request."""
    return merge_outputs(run_parts(engine, prompt, **params))


def run_parts(engine: Engine, prompt: str | Sequence[int], **params: Any) -> list[RequestOutput]:
    """What each step gave; the pool is empty afterwards."""
    engine.add_request("r", prompt, SamplingParams(**{"ignore_eos": True, **params}))
    parts = []
    while engine.has_unfinished:
        parts += engine.step()
        engine.scheduler.check()
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    assert parts[-1].finished
    assert not any(part.finished for part in parts[:-1])
    return parts


SAMPLED: dict[str, Any] = {"temperature": 1.5, "seed": 3, "max_tokens": 12}


def test_choices_have_an_index_and_come_together(engine: Engine) -> None:
    parts = run_parts(engine, PROMPT, n=3, logprobs=0, **SAMPLED)
    assert [[c.index for c in part.outputs] for part in parts] == [[0, 1, 2]] * 12
    whole = merge_outputs(parts)
    assert [len(c.token_ids) for c in whole.outputs] == [12] * 3
    assert len({c.token_ids for c in whole.outputs}) == 3
    (single,) = run(engine, logprobs=0, **SAMPLED).outputs
    assert whole.outputs[0].token_ids == single.token_ids, "the first is what one alone gets"
    for choice in whole.outputs:
        total = sum(entry.logprob for entry in choice.logprobs or ())
        assert choice.cumulative_logprob == pytest.approx(total)


def test_greedy_choices_are_the_same(engine: Engine) -> None:
    one, two = run(engine, n=2, max_tokens=6).outputs
    assert (one.token_ids, one.text) == (two.token_ids, two.text)


def test_choices_end_alone(engine: Engine) -> None:
    whole = run(engine, n=4, **SAMPLED).outputs
    stop = next(t for t in whole[1].token_ids if t not in whole[0].token_ids)
    cut = run(engine, n=4, stop_token_ids=[stop], **SAMPLED).outputs
    assert cut[0].token_ids == whole[0].token_ids
    at = whole[1].token_ids.index(stop)
    assert cut[1].token_ids == whole[1].token_ids[: at + 1]
    assert (cut[0].finish_reason, cut[1].finish_reason) == ("length", "stop")


def test_a_stop_string_ends_one_choice(engine: Engine) -> None:
    whole = run(engine, n=3, **SAMPLED).outputs
    stop = next(
        whole[1].text[i : i + 2]
        for i in range(4, 20)
        if whole[1].text[i : i + 2] not in whole[0].text
    )
    cut = run(engine, n=3, stop=stop, **SAMPLED).outputs
    assert cut[0].text == whole[0].text
    assert cut[1].text == whole[1].text[: whole[1].text.index(stop)]
    assert cut[1].stop_reason == stop


@pytest.mark.parametrize("n", [1, 2, 4])
def test_the_best_have_the_greatest_mean_logprob(engine: Engine, n: int) -> None:
    def mean(choice: CompletionOutput) -> float:
        return sum(e.logprob for e in choice.logprobs or ()) / len(choice.token_ids)

    # An end token, so that lengths differ and a sum would choose others than a mean.
    ends: dict[str, Any] = {"stop_token_ids": list(range(100, 140)), **SAMPLED}
    every = run(engine, n=4, logprobs=0, **ends).outputs
    assert len({len(c.token_ids) for c in every}) > 1
    parts = run_parts(engine, PROMPT, n=n, best_of=4, **ends)
    if n < 4:
        assert len(parts) == 1, "which are the best is known at the end"
    best = merge_outputs(parts).outputs
    expected = sorted(every, key=mean, reverse=True)[:n] if n < 4 else every
    assert [c.token_ids for c in best] == [c.token_ids for c in expected]
    assert [c.text for c in best] == [c.text for c in expected]
    assert [c.index for c in best] == list(range(n))
    assert all(c.logprobs is None for c in best)


def test_cancelling_ends_every_choice(engine: Engine) -> None:
    engine.add_request("r", PROMPT, SamplingParams(n=3, ignore_eos=True, **SAMPLED))
    engine.step()
    engine.step()
    output = engine.abort("r")
    assert output is not None and output.finished
    assert [c.finish_reason for c in output.outputs] == ["abort"] * 3
    assert engine.abort("r") is None
    assert not engine.has_unfinished


def raw(engine: Engine, tokens: Sequence[int]) -> NDArray[np.float64]:
    """Log-probabilities after each token, from one step of one sequence by itself."""
    rows: list[NDArray[np.float32]] = []
    real = engine.executor

    class Spy(Wrapped):
        def launch(self, step: Step) -> Running:
            running = self.inner.launch(step)
            rows.append(running.result().logits)
            return running

    engine.executor = Spy(real)
    for length in range(1, len(tokens) + 1):
        engine.add_request("spy", tokens[:length], SamplingParams(max_tokens=1, logprobs=0))
        while engine.has_unfinished:
            engine.step()
    engine.executor = real
    wide = np.concatenate(rows).astype(np.float64)
    wide -= wide.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
    return result


@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_logprobs_of_a_prompt(engine: Engine, max_tokens: int) -> None:
    answer = run(engine, prompt_logprobs=2, max_tokens=max_tokens)
    tokens = answer.prompt_token_ids
    assert answer.prompt_logprobs is not None
    first, *entries = answer.prompt_logprobs
    assert first is None
    expected = raw(engine, tokens)
    assert len(entries) == len(tokens) - 1
    for row, token, entry in zip(expected, tokens[1:], entries, strict=False):
        assert entry is not None
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(row[token], abs=1e-4)
        order = np.argsort(-row, kind="stable")
        assert [i for i, _ in entry.top] == order[:2].tolist()
        assert order[entry.rank - 1] == token
    assert len(answer.outputs[0].token_ids) == max_tokens
    assert answer.outputs[0].finish_reason == "length"


def test_logprobs_of_a_prompt_come_once_and_skip_the_cache(engine: Engine) -> None:
    prompt = [5, 6, 7, 8] * 6
    run(engine, prompt, max_tokens=1)
    assert run(engine, prompt, max_tokens=1).metrics.num_cached_tokens > 0
    parts = run_parts(engine, prompt, prompt_logprobs=0, max_tokens=3, n=2, temperature=1.0)
    assert parts[0].metrics.num_cached_tokens == 0
    assert [part.prompt_logprobs is not None for part in parts] == [True, False, False]
    assert len(parts[0].prompt_logprobs or ()) == len(prompt)
    assert len(run(engine, [5], prompt_logprobs=0, max_tokens=1).prompt_logprobs or ()) == 1


def test_a_prompt_of_the_whole_context_can_be_read(engine: Engine) -> None:
    limit = engine.plan.limits.max_context
    prompt = [3 + i % 50 for i in range(limit)]
    answer = run(engine, prompt, prompt_logprobs=0, max_tokens=0)
    assert len(answer.prompt_logprobs or ()) == limit
    with pytest.raises(RequestError, match="the prompt has"):
        run(engine, [*prompt, 3], prompt_logprobs=0, max_tokens=0)


@pytest.mark.parametrize("at", [0, 20])
def test_a_prompt_without_finite_logits_fails_alone(engine: Engine, at: int) -> None:
    real = engine.executor

    class Poisoned(Wrapped):
        def launch(self, step: Step) -> Running:
            running = self.inner.launch(step)
            for rows in owners_in_flight(engine).prompt_rows:
                if rows.request.request_id == "bad" and rows.first_position >= at:
                    running.result().logits[step.place(rows.first_row)] = np.nan
            return running

    engine.executor = Poisoned(real)
    try:
        bad = SamplingParams(max_tokens=2, prompt_logprobs=0, n=2, temperature=1.0)
        engine.add_request("bad", [3, 4, 5] * 8, bad)
        engine.add_request("good", [3, 4, 5], SamplingParams(max_tokens=3, ignore_eos=True))
        parts: dict[str, list[RequestOutput]] = {"bad": [], "good": []}
        while engine.has_unfinished:
            for output in engine.step():
                parts[output.request_id].append(output)
            engine.scheduler.check()
    finally:
        engine.executor = real
    failed = merge_outputs(parts["bad"])
    assert failed.finished and failed.error == "the logits hold no finite value"
    assert {c.finish_reason for c in failed.outputs} == {"error"}
    assert len(merge_outputs(parts["good"]).outputs[0].token_ids) == 3


@pytest.mark.parametrize("field", ["logit_bias", "allowed_token_ids", "banned_token_ids"])
def test_tokens_beyond_the_vocabulary_are_refused(engine: Engine, field: str) -> None:
    tokens: Any = {5000: 1.0} if field == "logit_bias" else [5000]
    with pytest.raises(RequestError, match="5000 is not a token id") as caught:
        run(engine, **{field: tokens})
    assert caught.value.field == field


def test_no_room_for_the_least_number_of_tokens(engine: Engine) -> None:
    with pytest.raises(RequestError, match="min_tokens") as caught:
        run(engine, min_tokens=90)
    assert caught.value.field == "min_tokens"


def test_min_tokens_holds_off_every_end(engine: Engine) -> None:
    (plain,) = run(engine, max_tokens=8).outputs
    end = plain.token_ids[1]
    (short,) = run(engine, max_tokens=8, stop_token_ids=[end]).outputs
    assert len(short.token_ids) == 2
    (longer,) = run(engine, max_tokens=8, stop_token_ids=[end], min_tokens=5).outputs
    assert len(longer.token_ids) >= 5
    assert end not in longer.token_ids[:5]


def test_seeds_are_drawn_once_a_request(engine: Engine) -> None:
    params: dict[str, Any] = {"temperature": 2.0, "max_tokens": 10, "n": 2}
    first, second = run(engine, **params).outputs, run(engine, **params).outputs
    assert [c.token_ids for c in first] != [c.token_ids for c in second]


def test_the_checkpoint_recommends_and_the_caller_decides(tmp_path: Path) -> None:
    generation = {"do_sample": True, "temperature": 0.7, "min_p": 0.1, "repetition_penalty": 1.2}
    with LLM(write_small_artifact(tmp_path / "small", generation=generation)) as llm:
        params = llm.recommended_params(max_tokens=3, min_p=0.0)
    assert params == SamplingParams(temperature=0.7, repetition_penalty=1.2, max_tokens=3)


def test_recommended_bans_and_stop_strings(tmp_path: Path) -> None:
    with LLM(write_small_artifact(tmp_path / "plain")) as llm:
        plain = llm.generate([[5, 6, 7]], SamplingParams(max_tokens=8))[0].outputs[0]
    unwanted = plain.token_ids[0]
    generation = {"suppress_tokens": [unwanted], "stop_strings": ["no such text"]}
    with LLM(write_small_artifact(tmp_path / "small", generation=generation)) as llm:
        asked = llm.recommended_params(max_tokens=8)
        assert asked.stop_strings == ("no such text",)
        banned = llm.generate([[5, 6, 7]], asked)[0].outputs[0]
        given = llm.recommended_params(max_tokens=8, banned_token_ids=(), stop=())
        free = llm.generate([[5, 6, 7]], given)[0].outputs[0]
    assert unwanted not in banned.token_ids
    assert free.token_ids == plain.token_ids


class Ascending:
    """A constraint with state: each token is greater than the one before."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.asked: list[int] = []

    def mask(self, output_ids: Sequence[int]) -> NDArray[np.bool_]:
        self.asked.append(len(output_ids))
        last = output_ids[-1] if output_ids else 0
        allowed: NDArray[np.bool_] = np.arange(self.vocab_size) > last
        return allowed

    def rollback(self, num_tokens: int) -> None: ...

    def fork(self) -> Ascending:
        return Ascending(self.vocab_size)


def test_a_constraint_serves_each_choice_by_itself(artifact: Path) -> None:
    engine = Engine.open(artifact, RuntimeOptions(max_sequences=2))
    constraint = Ascending(engine.vocab_size)
    params = SamplingParams(n=2, temperature=2.0, seed=1, max_tokens=4, ignore_eos=True)
    engine.add_request("r", PROMPT, params, constraint=constraint)
    parts = []
    while engine.has_unfinished:
        parts += engine.step()
    engine.close()
    for choice in merge_outputs(parts).outputs:
        assert list(choice.token_ids) == sorted(set(choice.token_ids))
    assert constraint.asked == list(range(len(merge_outputs(parts).outputs[0].token_ids)))


class Faulty:
    """A constraint that gives one thing, whatever was asked; or raises it."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def mask(self, output_ids: Sequence[int]) -> NDArray[np.bool_]:
        if isinstance(self.given, Exception):
            raise self.given
        mask: NDArray[np.bool_] = self.given
        return mask

    def rollback(self, num_tokens: int) -> None: ...

    def fork(self) -> Faulty:
        return self


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (KeyError("state"), "Faulty failed: KeyError: 'state'"),
        (np.ones(3, np.bool_), "Faulty returned bool [3], not bool"),
        (np.ones(100000, np.int64), "Faulty returned int64 [100000]"),
        ([True], "Faulty returned list"),
        (None, "Faulty returned NoneType"),
    ],
)
def test_a_faulty_constraint_ends_its_own_request_alone(
    engine: Engine, given: Any, said: str
) -> None:
    expected = run(engine, max_tokens=4).outputs[0].token_ids
    engine.add_request("faulty", PROMPT, constraint=Faulty(given))
    engine.add_request("r", PROMPT, SamplingParams(max_tokens=4, ignore_eos=True))
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    engine.scheduler.check()
    (ended,) = [output for output in outputs if output.request_id == "faulty"]
    assert ended.outputs[0].finish_reason == "error"
    assert said in (ended.error or "")
    whole = merge_outputs([output for output in outputs if output.request_id == "r"])
    assert whole.outputs[0].token_ids == expected


def test_a_prompt_that_does_not_fit_is_refused_before_it_is_copied(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(Request, "sibling", lambda *_: made.append(1))
    too_long = [1] * (engine.plan.limits.max_context + 1)
    with pytest.raises(RequestError, match="prompt"):
        engine.prepare("r", too_long, SamplingParams(n=8))
    assert not made
