"""Completions through the unmodified client: whole, streamed, many at once."""

import asyncio
import math
from typing import Any

import openai
import pytest
from openai.types import Completion

from infc.runtime.async_engine import AsyncEngine
from infc.runtime.requests.outputs import RequestOutput, merge_outputs
from infc.runtime.sampling.sampling_params import SamplingParams

from .serving import Serving, serving, tiny_tokenizer

PROMPT = "def fibonacci(n):\n    return"
GREEDY: dict[str, Any] = {"model": "toy", "temperature": 0, "max_tokens": 12}


def ask_engine(
    engine: AsyncEngine, prompt: str | list[int], params: SamplingParams
) -> RequestOutput:
    """The answer without any HTTP."""

    async def run() -> RequestOutput:
        return merge_outputs([output async for output in engine.generate(prompt, params)])

    return asyncio.run(run())


def test_whole_answer_is_the_engines(server: Serving) -> None:
    answer = server.client().completions.create(prompt=PROMPT, **GREEDY)
    alone = ask_engine(server.engine, PROMPT, SamplingParams(max_tokens=12))
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    assert answer.model == "toy"
    choice = answer.choices[0]
    assert (choice.index, choice.text) == (0, alone.outputs[0].text)
    assert choice.finish_reason == alone.outputs[0].finish_reason == "length"
    assert choice.logprobs is None
    usage = answer.usage
    assert usage is not None
    assert usage.prompt_tokens == len(tiny_tokenizer().encode(PROMPT))
    assert usage.completion_tokens == 12
    assert usage.total_tokens == usage.prompt_tokens + 12


def test_stream_adds_up_to_the_whole(server: Serving) -> None:
    client = server.client()
    whole = client.completions.create(prompt=PROMPT, **GREEDY)
    chunks = list(
        client.completions.create(
            prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == whole.choices[0].text
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [
        "length"
    ]
    assert {c.id for c in chunks} == {chunks[0].id}
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None and whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert len(chunks) > 4, "the stream came in one piece"


def test_events_end_with_done_and_count_only_when_asked(server: Serving) -> None:
    response = server.post("/v1/completions", {"prompt": PROMPT, "stream": True, **GREEDY})
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert "usage" not in response.text
    assert response.text.isascii(), "some clients split lines at U+2028"


def test_prompts_of_every_kind(server: Serving) -> None:
    client = server.client()
    ids = tiny_tokenizer().encode(PROMPT)
    alone = client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text
    other = client.completions.create(prompt="class Stack:", **GREEDY).choices[0].text
    assert alone != other
    assert client.completions.create(prompt=ids, **GREEDY).choices[0].text == alone
    for prompt in ([PROMPT, "class Stack:"], [ids, tiny_tokenizer().encode("class Stack:")]):
        answer = client.completions.create(prompt=prompt, **GREEDY)
        assert [(c.index, c.text) for c in answer.choices] == [(0, alone), (1, other)]
        assert answer.usage is not None and answer.usage.completion_tokens == 24
        texts = ["", ""]
        for chunk in client.completions.create(prompt=prompt, stream=True, **GREEDY):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == [alone, other]


def test_many_streams_at_once_give_what_each_gets_alone(server: Serving) -> None:
    def request(index: int) -> dict[str, Any]:
        sampled = {"temperature": 0.9, "top_p": 0.9, "seed": index} if index % 2 else {}
        prompt = f"value_{index} = " + "x" * index
        return {**GREEDY, "max_tokens": 8 + index % 5, "prompt": prompt, **sampled}

    client = server.client()
    alone = [client.completions.create(**request(i)).choices[0].text for i in range(64)]

    async def stream(client: openai.AsyncOpenAI, index: int) -> str:
        chunks = await client.completions.create(stream=True, **request(index))
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def run() -> list[str]:
        url = f"{server.url}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(stream(client, index) for index in range(64)))

    assert asyncio.run(run()) == alone


def test_stop_strings_and_ids_end_the_text_before_them(server: Serving) -> None:
    client = server.client()
    text = client.completions.create(prompt=PROMPT, **GREEDY).choices[0].text
    stop = text[5:8]
    for extra in ({"stop": stop}, {"stop": ["never in it", stop]}):
        stopped = client.completions.create(prompt=PROMPT, **{**GREEDY, **extra}).choices[0]
        assert stopped.text == text[: text.index(stop)]
        assert stopped.finish_reason == "stop"
        chunks = client.completions.create(prompt=PROMPT, stream=True, **{**GREEDY, **extra})
        assert "".join(c.choices[0].text for c in chunks) == stopped.text
    ids = ask_engine(server.engine, PROMPT, SamplingParams(max_tokens=12)).outputs[0].token_ids
    extra_body = {"stop_token_ids": [ids[3]]}
    stopped = client.completions.create(prompt=PROMPT, extra_body=extra_body, **GREEDY).choices[0]
    assert stopped.finish_reason == "stop"
    assert text.startswith(stopped.text)


def test_logprobs(server: Serving) -> None:
    client = server.client()
    whole = client.completions.create(prompt=PROMPT, logprobs=3, **GREEDY)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens and logprobs.token_logprobs
    assert logprobs.top_logprobs and logprobs.text_offset
    lengths = {len(logprobs.tokens), len(logprobs.token_logprobs), len(logprobs.text_offset)}
    assert lengths == {12}
    for token, own, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert own is not None
        assert top[token] == own == max(top.values()), "greedy takes the likeliest"
        assert len(top) == 3
        assert sum(map(math.exp, top.values())) < 1
    ends = [len("".join(logprobs.tokens[:count])) for count in range(12)]
    assert "".join(logprobs.tokens) == whole.choices[0].text, "no special tokens, nor parts of any"
    assert logprobs.text_offset == ends
    streamed: dict[str, list[Any]] = {"tokens": [], "text_offset": [], "token_logprobs": []}
    for chunk in client.completions.create(prompt=PROMPT, logprobs=3, stream=True, **GREEDY):
        part = chunk.choices[0].logprobs
        for name, values in streamed.items():
            values.extend(getattr(part, name) if part else [])
    assert streamed == {name: getattr(logprobs, name) for name in streamed}


def test_without_a_seed_answers_differ_and_with_one_they_agree(server: Serving) -> None:
    client = server.client()

    def text(**options: Any) -> str:
        options = {"model": "toy", "prompt": PROMPT, "max_tokens": 12, **options}
        answer: Completion = client.completions.create(**options)
        return answer.choices[0].text

    assert text(seed=7) == text(seed=7)
    assert len({text() for _ in range(4)}) > 1, "temperature is 1 unless told otherwise"


def test_sixteen_tokens_unless_told_otherwise(server: Serving) -> None:
    answer = server.client().completions.create(model="toy", prompt=PROMPT, temperature=0)
    assert answer.usage is not None and answer.usage.completion_tokens == 16


def token_ids(choice: object) -> list[int]:
    """The ids that a choice carries beside what the client knows of."""
    ids = getattr(choice, "token_ids")  # noqa: B009 - the client's type has no such field
    assert isinstance(ids, list)
    return ids


def test_token_ids_where_they_are_asked_for(server: Serving) -> None:
    client = server.client()
    alone = list(
        ask_engine(server.engine, PROMPT, SamplingParams(max_tokens=12)).outputs[0].token_ids
    )
    asked: dict[str, Any] = {"prompt": PROMPT, "extra_body": {"return_token_ids": True}, **GREEDY}
    assert token_ids(client.completions.create(**asked).choices[0]) == alone
    chunks = list(client.completions.create(stream=True, **asked))
    assert [token for chunk in chunks for token in token_ids(chunk.choices[0])] == alone
    plain = client.completions.create(prompt=PROMPT, **GREEDY)
    assert not hasattr(plain.choices[0], "token_ids")


def test_without_a_tokenizer_only_token_ids() -> None:
    with serving(with_tokenizer=False) as server:
        client = server.client()
        answer = client.completions.create(prompt=[5, 6, 7], logprobs=2, **GREEDY)
        alone = ask_engine(server.engine, [5, 6, 7], SamplingParams(max_tokens=12)).outputs[0]
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens == [f"token_id:{token}" for token in alone.token_ids]
        assert token_ids(answer.choices[0]) == list(alone.token_ids)
        chunks = list(client.completions.create(prompt=[5, 6, 7], stream=True, **GREEDY))
        streamed = [token for chunk in chunks for token in token_ids(chunk.choices[0])]
        assert streamed == list(alone.token_ids)
        with pytest.raises(openai.BadRequestError, match="no tokenizer"):
            client.completions.create(prompt=PROMPT, **GREEDY)
        with pytest.raises(openai.BadRequestError, match="no tokenizer"):
            client.chat.completions.create(
                model="toy", messages=[{"role": "user", "content": "hello"}]
            )
