"""Every sampling field through the unmodified client: what comes is what the engine gives alone."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from infc.runtime.sampling.sampling_params import SamplingParams

from .serving import Serving, tiny_tokenizer
from .test_completions import PROMPT, ask_engine
from .test_errors import refusal

BASE: dict[str, Any] = {"model": "toy", "max_tokens": 10}
MESSAGES: list[Any] = [{"role": "user", "content": "Write a class."}]
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 11}
# A field, whether the client knows it, and what makes it show.
FIELDS: list[tuple[str, bool, Any, dict[str, Any]]] = [
    ("min_p", False, 0.3, SAMPLED),
    ("top_k", False, 2, SAMPLED),
    ("top_p", True, 0.2, SAMPLED),
    ("repetition_penalty", False, 9.0, {**SAMPLED, "allowed_token_ids": list(range(300, 310))}),
    ("presence_penalty", True, 2.0, SAMPLED),
    ("frequency_penalty", True, 2.0, SAMPLED),
    ("logit_bias", True, {"300": 90, "301": 90.5}, {"temperature": 0}),
    ("allowed_token_ids", False, [300, 301, 302], SAMPLED),
    ("banned_token_ids", False, list(range(0, 4096, 2)), {"temperature": 0}),
    ("min_tokens", False, 10, {"temperature": 0, "stop_token_ids": list(range(4000))}),
    ("ignore_eos", False, True, {"temperature": 0, "logit_bias": {"2": 100}}),
    ("stop_token_ids", False, list(range(4000)), {"temperature": 0}),
    ("seed", True, 12, {"temperature": 1}),
]
CLIENTS_OWN = {
    "temperature",
    "logit_bias",
    "seed",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
}


def create(server: Serving, options: dict[str, Any]) -> Any:
    """A completion; fields that the client does not know go as its `extra_body`."""
    known = CLIENTS_OWN | {"n", "best_of", "echo", "logprobs", "stream", "stream_options"}
    own = {name: value for name, value in options.items() if name in known}
    extra = {name: value for name, value in options.items() if name not in known}
    extra.setdefault("return_token_ids", True)
    return server.client().completions.create(prompt=PROMPT, extra_body=extra, **BASE, **own)


@pytest.mark.parametrize(("name", "known", "value", "rest"), FIELDS, ids=[f[0] for f in FIELDS])
def test_a_field_does_what_it_does_in_the_engine(
    server: Serving, name: str, known: bool, value: Any, rest: dict[str, Any]
) -> None:
    options = {**rest, name: value}
    assert (name in CLIENTS_OWN) == known
    choice = create(server, options).choices[0]
    params = {"temperature": 1.0, **options, "max_tokens": 10}
    if "logit_bias" in params:
        params["logit_bias"] = {int(token): bias for token, bias in params["logit_bias"].items()}
    alone = ask_engine(server.engine, PROMPT, SamplingParams(**params)).outputs[0]
    assert choice.token_ids == list(alone.token_ids)
    assert choice.text == alone.text
    assert choice.finish_reason == alone.finish_reason
    without = create(server, rest).choices[0]
    assert choice.token_ids != without.token_ids, "the field shows"
    extra = {k: v for k, v in options.items() if k not in CLIENTS_OWN}
    own = {k: v for k, v in options.items() if k in CLIENTS_OWN}
    chat = server.client().chat.completions.create(
        messages=MESSAGES, extra_body={**extra, "return_token_ids": True}, **BASE, **own
    )
    ids = tiny_tokenizer().encode_chat(MESSAGES)
    alone = ask_engine(server.engine, ids, SamplingParams(**params)).outputs[0]
    assert getattr(chat.choices[0], "token_ids") == list(alone.token_ids)  # noqa: B009


@pytest.mark.parametrize("best_of", [None, 5])
def test_several_choices_are_those_of_the_engine(server: Serving, best_of: int | None) -> None:
    options = {**SAMPLED, "n": 3, "best_of": best_of, "ignore_eos": True}
    answer = create(server, options)
    params = SamplingParams(**options, max_tokens=10)
    alone = ask_engine(server.engine, PROMPT, params).outputs
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert [c.token_ids for c in answer.choices] == [list(one.token_ids) for one in alone]
    assert len({c.text for c in answer.choices}) == 3
    assert answer.usage.completion_tokens == 30
    assert answer.usage.prompt_tokens == len(tiny_tokenizer().encode(PROMPT))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_choices_of_several_prompts_are_numbered_in_a_stream_too(
    server: Serving, path: str
) -> None:
    options = {**BASE, **SAMPLED, "n": 3, "stop": ["\n\n"], "return_token_ids": True}
    prompts: list[Any] = ["a = ", "class "] if path == "/v1/completions" else [MESSAGES]
    field = "prompt" if path == "/v1/completions" else "messages"
    body = {**options, field: prompts if field == "prompt" else MESSAGES}
    whole = server.post(path, body).json()
    assert [c["index"] for c in whole["choices"]] == list(range(3 * len(prompts)))
    for number, prompt in enumerate(prompts):
        alone = server.post(path, {**body, field: prompt}).json()["choices"]
        part = whole["choices"][3 * number : 3 * number + 3]
        assert [c["token_ids"] for c in part] == [c["token_ids"] for c in alone]
    client = server.client()
    extra = {"return_token_ids": True}
    rest = {k: v for k, v in options.items() if k != "return_token_ids"}
    stream_options: Any = {"include_usage": True}
    chunks: list[Any]
    if field == "prompt":
        chunks = list(
            client.completions.create(
                prompt=prompts, stream=True, stream_options=stream_options, extra_body=extra, **rest
            )
        )
    else:
        chunks = list(
            client.chat.completions.create(
                messages=MESSAGES, stream=True, stream_options=stream_options, extra_body=extra,
                **rest,
            )
        )  # fmt: skip
    texts = [""] * len(whole["choices"])
    ids: list[list[int]] = [[] for _ in texts]
    ends: list[Any] = [None] * len(texts)
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        assert ends[choice.index] is None, "nothing after the end"
        ends[choice.index] = choice.finish_reason
        texts[choice.index] += choice.text if field == "prompt" else choice.delta.content or ""
        ids[choice.index] += getattr(choice, "token_ids", [])
    assert ids == [c["token_ids"] for c in whole["choices"]]
    assert ends == [c["finish_reason"] for c in whole["choices"]]
    said = [c["text"] if field == "prompt" else c["message"]["content"] for c in whole["choices"]]
    assert texts == said
    assert chunks[-1].usage.model_dump(exclude_none=True) == {
        **whole["usage"],
        "prompt_tokens_details": chunks[-1].usage.prompt_tokens_details.model_dump(
            exclude_none=True
        ),
    }


def test_an_echo_has_the_prompt_and_its_log_probabilities(server: Serving) -> None:
    ids = tiny_tokenizer().encode(PROMPT)
    plain = create(server, {"temperature": 0, "logprobs": 2, "prompt_logprobs": 3}).choices[0]
    echo = create(server, {"temperature": 0, "logprobs": 2, "echo": True, "n": 2})
    for choice in echo.choices:
        assert choice.text == PROMPT + plain.text
        logprobs = choice.logprobs
        lengths = {len(values) for values in logprobs.model_dump().values() if values is not None}
        assert lengths == {len(ids) + 10}
        assert "".join(logprobs.tokens[: len(ids)]) == PROMPT
        assert logprobs.token_logprobs[0] is None and logprobs.top_logprobs[0] is None
        assert logprobs.tokens[len(ids) :] == plain.logprobs.tokens
        assert logprobs.token_logprobs[len(ids) :] == plain.logprobs.token_logprobs
        assert logprobs.text_offset[len(ids)] == len(PROMPT)
        assert all(2 <= len(top) <= 3 for top in logprobs.top_logprobs[1:])
    # The same as their own field, and as the engine has them.
    alone = ask_engine(server.engine, PROMPT, SamplingParams(max_tokens=1, prompt_logprobs=3))
    assert alone.prompt_logprobs is not None
    entries = plain.prompt_logprobs
    assert entries[0] is None and len(entries) == len(ids)
    for mine, theirs, echoed in zip(
        entries[1:], alone.prompt_logprobs[1:], echo.choices[0].logprobs.token_logprobs[1:],
        strict=False,
    ):  # fmt: skip
        assert theirs is not None
        assert mine["logprob"] == theirs.logprob == echoed
        assert len(mine["top_logprobs"]) == 3
    body = {**BASE, "prompt": PROMPT, "echo": True, "max_tokens": 0}
    only = server.post("/v1/completions", body).json()
    assert only["choices"][0]["text"] == PROMPT
    assert only["usage"]["completion_tokens"] == 0
    logged = server.post("/v1/completions", {**body, "logprobs": 2}).json()["choices"][0]
    assert logged["text"] == PROMPT
    assert logged["logprobs"]["token_logprobs"] == logprobs.token_logprobs[: len(ids)]
    by_ids = server.post(
        "/v1/completions", {**BASE, "prompt": ids, "temperature": 0, "echo": True}
    ).json()
    assert by_ids["choices"][0]["text"] == PROMPT + plain.text
    chunks = list(create(server, {"temperature": 0, "logprobs": 2, "echo": True, "stream": True}))
    assert "".join(c.choices[0].text for c in chunks) == PROMPT + plain.text
    streamed = [p for c in chunks for p in c.choices[0].logprobs.token_logprobs]
    assert streamed == echo.choices[0].logprobs.token_logprobs


def test_log_probabilities_of_a_chats_prompt(server: Serving) -> None:
    body = {**BASE, "messages": MESSAGES, "prompt_logprobs": 1}
    choice = server.post("/v1/chat/completions", body).json()["choices"][0]
    ids = tiny_tokenizer().encode_chat(MESSAGES)
    assert choice["prompt_logprobs"][0] is None and len(choice["prompt_logprobs"]) == len(ids)
    assert all(len(entry["top_logprobs"]) == 1 for entry in choice["prompt_logprobs"][1:])


def test_the_best_of_several_cannot_be_streamed(server: Serving) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        create(server, {"n": 1, "best_of": 2, "stream": True})
    assert caught.value.param == "best_of"


def test_fields_that_contradict_each_other_are_named(server: Serving) -> None:
    for change, param in (
        ({"min_tokens": 11}, "min_tokens"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"allowed_token_ids": [5], "banned_token_ids": [5]}, "allowed_token_ids"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"allowed_token_ids": [0, 2], "min_tokens": 3}, "allowed_token_ids"),
        ({"banned_token_ids": list(range(4096))}, "banned_token_ids"),
    ):
        body = {**BASE, "prompt": PROMPT, **change}
        assert refusal(server.post("/v1/completions", body))["param"] == param
