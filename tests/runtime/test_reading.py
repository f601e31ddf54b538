"""Scores and embeddings: every row of a prompt once, whatever runs beside it."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from infc.ir.errors import InfcError, RequestError
from infc.runtime.api.async_llm import AsyncLLM
from infc.runtime.api.llm import LLM
from infc.runtime.api.reading import Score
from infc.runtime.engine import Engine
from infc.runtime.executors.base import Finished
from infc.runtime.limits import RuntimePlan
from infc.runtime.requests.outputs import RequestOutput, merge_outputs
from infc.runtime.sampling.sampling_params import SamplingParams
from infc.runtime.scheduling.admission import SchedulerLimits
from infc.runtime.scheduling.step import Step

from .executors import Wrapped, owners_in_flight
from .paged_model import PagedModel, hidden_of, logits_of, make_group, prefix_states
from .small_artifact import write_small_artifact

VOCAB, WIDTH = 50, 6
PROMPTS = ["the cat", "the hat sat on the mat and the cat", "the cat sat"]


class Spy(PagedModel):
    """Notes for which steps the head was run."""

    heads: tuple[bool, ...] = ()

    def launch(self, step: Step) -> Finished:
        self.heads += (step.needs_head,)
        return super().launch(step)


def make_engine(num_blocks: int = 60, logit_rows: int = 5) -> Engine:
    groups = (make_group("full", 4, None), make_group("window", 4, 9))
    limits = SchedulerLimits(step_tokens=16, max_sequences=4, logit_rows=logit_rows, max_context=64)
    plan = RuntimePlan(
        limits=limits,
        groups=groups,
        num_blocks=(num_blocks, num_blocks),
        num_threads=1,
        pin=False,
        weights="loaded",
        prefix_reuse=True,
    )
    executor = Spy(groups, plan.num_blocks, VOCAB, WIDTH)
    return Engine(executor, plan, vocab_size=VOCAB, hidden_width=WIDTH)


def finish(engine: Engine) -> dict[str, RequestOutput]:
    """The whole answer of each request; afterwards nothing is held."""
    parts: dict[str, list[RequestOutput]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            parts.setdefault(output.request_id, []).append(output)
        engine.scheduler.check()
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    return {name: merge_outputs(each) for name, each in parts.items()}


def expected_embedding(prompt: list[int], pooling: str) -> NDArray[np.float32]:
    rows = [hidden_of(state, WIDTH) for state in prefix_states(prompt)]
    rows = rows if pooling == "mean" else rows[-1:]
    total = np.zeros(WIDTH)
    for row in rows:
        total += row
    return (total / len(rows)).astype(np.float32)


def assert_embedded(answer: RequestOutput, prompt: list[int]) -> None:
    assert answer.embedding is not None
    assert np.array_equal(answer.embedding, expected_embedding(prompt, "mean"))


def expected_logprobs(prompt: list[int], first: int) -> list[float]:
    rows = [logits_of(state, VOCAB).astype(np.float64) for state in prefix_states(prompt)]
    return [
        float(row[token] - np.log(np.exp(row).sum()))
        for row, token in zip(rows[first - 1 :], prompt[first:], strict=False)
    ]


Kind = Literal["last", "mean", "score", "generate"]
REQUESTS = st.lists(
    st.tuples(
        st.sampled_from(["last", "mean", "score", "generate"]),
        st.lists(st.integers(0, 3), min_size=2, max_size=40),
        st.integers(1, 39),
    ),
    min_size=1,
    max_size=10,
)


@settings(max_examples=60, deadline=None)
@given(REQUESTS, st.sampled_from([14, 60]), st.sampled_from([4, 7, 16]), st.integers(0, 8))
def test_each_prompt_is_read_as_it_is_alone(
    requests: list[tuple[Kind, list[int], int]], num_blocks: int, logit_rows: int, late: int
) -> None:
    engine = make_engine(num_blocks, logit_rows)
    parts: list[RequestOutput] = []
    for i, (kind, prompt, first) in enumerate(requests):
        if i == late:
            parts = [output for _ in range(3) for output in engine.step()]
        name = str(i)
        if kind == "generate":
            engine.add_request(name, prompt, SamplingParams(max_tokens=3))
        elif kind == "score":
            engine.read_prompt(name, prompt, first_scored=min(first, len(prompt) - 1))
        else:
            engine.read_prompt(name, prompt, pooling=kind)
    answers = finish(engine)
    answers |= {part.request_id: part for part in parts if part.finished and part.embedding is None}
    answers |= {part.request_id: part for part in parts if part.embedding is not None}
    for i, (kind, prompt, first) in enumerate(requests):
        answer = answers[str(i)]
        assert (answer.embedding is not None) is (kind in ("last", "mean"))
        if answer.embedding is not None:
            assert np.array_equal(answer.embedding, expected_embedding(prompt, kind))
            assert answer.outputs[0].token_ids == () and answer.prompt_logprobs is None
        elif kind == "score":
            first = min(first, len(prompt) - 1)
            assert answer.prompt_logprobs is not None
            assert answer.prompt_logprobs[:first] == (None,) * first
            given = [entry.logprob for entry in answer.prompt_logprobs[first:] if entry is not None]
            assert given == pytest.approx(expected_logprobs(prompt, first), abs=1e-9)


def test_embeddings_alone_never_run_the_head_and_beside_others_do() -> None:
    engine = make_engine()
    executor = engine.executor
    assert isinstance(executor, Spy)
    engine.read_prompt("a", [1, 2, 3] * 9, pooling="mean")
    engine.read_prompt("b", [3, 2, 1] * 9, pooling="last")
    finish(engine)
    assert len(executor.heads) > 2 and not any(executor.heads)
    engine.read_prompt("a", [2, 2, 3], pooling="last")
    engine.add_request("b", [3, 3], SamplingParams(max_tokens=2))
    finish(engine)
    assert executor.heads[-2:] == (True, True)


def test_preempted_prompts_are_pooled_once() -> None:
    engine = make_engine(num_blocks=14, logit_rows=4)
    prompts = [[i, 1, 2, 3] * 8 for i in range(3)]
    for i in range(3):
        params = SamplingParams(max_tokens=30)
        engine.add_request(f"beside {i}", [i], params, priority=-1)
    for i, prompt in enumerate(prompts):
        engine.read_prompt(str(i), prompt, pooling="mean")
    answers = finish(engine)
    assert engine.stats().num_preemptions > 0
    for i, prompt in enumerate(prompts):
        assert_embedded(answers[str(i)], prompt)


def test_a_state_that_is_not_finite_fails_alone() -> None:
    engine = make_engine()

    class Poisoned(Wrapped):
        def launch(self, step: Step) -> Finished:
            output = self.inner.launch(step).result()
            assert output.hidden is not None
            owners = owners_in_flight(engine)
            for request, row in zip(owners.sampled, owners.sampled_rows, strict=True):
                if request.token_ids[0] == 9:
                    output.hidden[row, 2] = np.nan
            return Finished(output)

    engine.executor = Poisoned(engine.executor)
    engine.read_prompt("bad", [9, 1], pooling="mean")
    engine.read_prompt("good", [1, 9], pooling="mean")
    answers = finish(engine)
    assert answers["bad"].error == "the hidden states are not finite"
    assert answers["bad"].outputs[0].finish_reason == "error"
    assert_embedded(answers["good"], [1, 9])


def test_a_priority_that_is_no_number_is_refused() -> None:
    engine = make_engine()
    with pytest.raises(RequestError, match="priority must be an integer"):
        engine.read_prompt("a", [1, 2, 3], priority="high")  # type: ignore[arg-type]
    assert not engine.has_unfinished


def test_an_aborted_prompt_has_no_embedding() -> None:
    engine = make_engine()
    engine.read_prompt("a", [1, 2, 3] * 12, pooling="mean")
    engine.step()
    output = engine.abort("a")
    assert output is not None and output.embedding is None


# --- the Python face ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_artifact(tmp_path_factory.mktemp("reading") / "small")


@pytest.fixture(scope="module")
def llm(artifact: Path) -> LLM:
    return LLM(artifact)


def test_a_score_is_what_generating_says_of_the_same_tokens(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.3, seed=3, logprobs=0, ignore_eos=True)
    (answer,) = llm.generate(PROMPTS[0], params)
    tokens, logprobs = answer.outputs[0].token_ids, answer.outputs[0].logprobs or ()
    (score,) = llm.score(PROMPTS[0], [list(tokens)])
    assert score.token_ids == tokens
    assert score.context_token_ids == answer.prompt_token_ids
    assert score.logprobs == pytest.approx([entry.logprob for entry in logprobs], abs=1e-5)
    assert score.ranks == tuple(entry.rank for entry in logprobs)
    assert score.total == pytest.approx(answer.outputs[0].cumulative_logprob, abs=1e-4)
    assert score.mean == pytest.approx(score.total / 12)
    assert score.perplexity == pytest.approx(math.exp(-score.total / 12))
    (whole,) = llm.score([[*answer.prompt_token_ids, *tokens]])
    assert whole.token_ids[-12:] == tokens
    assert whole.logprobs[-12:] == pytest.approx(score.logprobs, abs=1e-5)
    assert len(whole.token_ids) == len(answer.prompt_token_ids) - 1 + 12


def test_a_perplexity_beyond_a_float_is_infinite() -> None:
    score = Score(context_token_ids=(1,), token_ids=(2,), logprobs=(-750.0,), ranks=(9,))
    assert score.perplexity == math.inf


def test_what_is_greedy(llm: LLM) -> None:
    (answer,) = llm.generate("the", SamplingParams(max_tokens=8, ignore_eos=True))
    tokens = list(answer.outputs[0].token_ids)
    right, wrong = llm.score("the", [tokens, [*tokens[:-1], (tokens[-1] + 1) % 200]])
    assert right.is_greedy and set(right.ranks) == {1}
    assert not wrong.is_greedy and right.total > wrong.total


def test_pairs_of_text_are_tokenized_as_one(llm: LLM) -> None:
    assert llm.tokenizer is not None
    whole = llm.tokenizer.encode("the cat sat")
    for cut in range(4, len("the cat sat")):
        (score,) = llm.score("the cat sat"[:cut], "the cat sat"[cut:])
        assert (*score.context_token_ids, *score.token_ids) == tuple(whole)
        told = llm.tokenizer.decode(score.token_ids)
        assert told.endswith("the cat sat"[cut:])
        assert len(told) < len("the cat sat"[cut:]) + 4, "hardly more than the continuation"
    (joined,) = llm.score("the", [[5, 6]])
    assert joined.token_ids == (5, 6)
    (mixed,) = llm.score([[5, 6]], " cat")
    assert mixed.token_ids == tuple(llm.tokenizer.encode(" cat"))


def test_one_context_is_computed_once_for_many_continuations(artifact: Path) -> None:
    with LLM(artifact) as llm:
        context = [5, 6, 7, 8] * 12
        llm.score(context, [[1, 2]])
        before = llm.engine.stats().num_steps
        llm.score(context, [[3, 4]])
        assert llm.engine.stats().num_steps - before == 1, "a cached prefix leaves one chunk"
        llm.score([context])
        assert llm.engine.stats().num_steps - before > 4, "every row of it was asked for"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([[5]],), "has 1 tokens, and the first has no score"),
        (("the", ""), "the continuation has no tokens"),
        (("", "the cat"), "a continuation needs a prompt"),
        ((["the", "cat"], ["a", "b", "c"]), "3 continuations were given for 2 prompts"),
        (([5] * 97,), "the prompt has 97 tokens"),
        (([10**6, 1],), "not a token id"),
        ((3,), "prompts must be text"),
    ],
)
def test_what_cannot_be_scored(llm: LLM, args: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.score(*args)
    assert not llm.engine.has_unfinished


def test_errors_say_which_prompt_it_was(llm: LLM) -> None:
    prompts: list[str | list[int]] = ["the cat", [3]]
    with pytest.raises(RequestError) as caught:
        llm.score(prompts)
    assert caught.value.where == "prompts[1]"
    with pytest.raises(RequestError) as caught:
        llm.embed([*prompts[:1], [10**6]])
    assert caught.value.where == "prompts[1]"
    assert not llm.engine.has_unfinished


def test_embeddings_have_length_one_unless_told_otherwise(llm: LLM) -> None:
    for pooling in ("last", "mean"):
        raw = llm.embed(PROMPTS, pooling=pooling, normalize=False)
        unit = llm.embed(PROMPTS, pooling=pooling)
        for one, other in zip(raw, unit, strict=True):
            assert one.prompt_token_ids == other.prompt_token_ids
            assert np.asarray(other).dtype == np.float32
            assert np.linalg.norm(other) == pytest.approx(1.0, abs=1e-6)
            assert np.allclose(np.asarray(one) / np.linalg.norm(one), other, atol=1e-5)
    last, mean = (llm.embed("the cat", pooling=p)[0] for p in ("last", "mean"))
    assert not np.allclose(last, mean)


def test_an_embedding_is_an_array_to_numpy(llm: LLM) -> None:
    (vector,) = llm.embed("the cat")
    assert len(vector) == len(vector.values) == 16
    assert np.asarray(vector) is vector.values
    copied = np.array(vector)
    copied[:] = 0
    assert np.asarray(vector, dtype=np.float64).dtype == np.float64 and vector.values.any()
    with pytest.raises(ValueError, match="needs a copy"):
        np.array(vector, dtype=np.float64, copy=False)
    assert np.stack([vector, vector]).shape == (2, 16)
    assert vector == vector and vector != llm.embed("the cat")[0]


def test_what_cannot_be_embedded(artifact: Path, llm: LLM) -> None:
    with pytest.raises(RequestError, match="pooling is 'first', not 'last' or 'mean'") as caught:
        llm.embed("the cat", pooling="first")  # type: ignore[arg-type]
    assert caught.value.field == "pooling"
    with LLM(artifact) as other:
        other.engine.hidden_width = None
        with pytest.raises(RequestError, match=r"gives no hidden states .compile it again"):
            other.embed("the cat")
    for call in (other.embed, other.score):
        with pytest.raises(InfcError, match="this LLM is closed"):
            call("the cat")


def test_tasks_score_and_embed_beside_streams(artifact: Path, llm: LLM) -> None:
    scores, embeddings = llm.score(PROMPTS), llm.embed(PROMPTS, pooling="mean")
    pair = llm.score("the cat", " sat")[0]

    async def use() -> None:
        async with AsyncLLM(artifact) as served:
            params = SamplingParams(max_tokens=30, ignore_eos=True)
            stream = served.generate("the hat", params)
            await anext(stream)
            told, vectors, ended = await asyncio.gather(
                asyncio.gather(*map(served.score, PROMPTS)),
                asyncio.gather(*(served.embed(prompt, pooling="mean") for prompt in PROMPTS)),
                served.score("the cat", " sat"),
            )
            assert len([part async for part in stream]) > 0
            for one, other in zip(told, scores, strict=True):
                assert one.token_ids == other.token_ids
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
            for vector, wanted in zip(vectors, embeddings, strict=True):
                assert np.allclose(vector, wanted, atol=1e-5)
            assert ended.total == pytest.approx(pair.total, abs=1e-4)
            with pytest.raises(RequestError, match="the first has no score"):
                await served.score([5])
            with pytest.raises(RequestError, match="pooling is"):
                await served.embed("the", pooling="no")  # type: ignore[arg-type]
        with pytest.raises(InfcError, match="this AsyncLLM is closed"):
            await served.embed("the")

    asyncio.run(use())
