"""LLM over the reference executor: answers, streams, chats, limits, errors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infc.ir.artifact import open_artifact
from infc.ir.errors import (
    CapacityError,
    RequestError,
    UsageError,
)
from infc.runtime.api.llm import LLM
from infc.runtime.requests.outputs import merge_outputs
from infc.runtime.sampling.sampling_params import SamplingParams

from .small_artifact import write_small_artifact

PROMPTS = ["the cat", "the hat sat on the mat and the cat", "the", "für 你好 🙂"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_artifact(tmp_path_factory.mktemp("llm") / "small")


@pytest.fixture(scope="module")
def llm(artifact: Path) -> LLM:
    return LLM(artifact)


def test_batch_gives_what_each_gets_alone(artifact: Path, llm: LLM) -> None:
    params = [
        SamplingParams(max_tokens=20, temperature=t, seed=5, logprobs=2, ignore_eos=True)
        for t in (0.0, 1.0, 0.0, 0.7)
    ]
    together = llm.generate(PROMPTS, params)
    for prompt, chosen, answer in zip(PROMPTS, params, together, strict=True):
        with LLM(artifact, prefix_reuse=False, max_sequences=1) as fresh:
            (alone,) = fresh.generate(prompt, chosen)
        assert answer.prompt == prompt
        assert alone.outputs[0].token_ids == answer.outputs[0].token_ids
        assert alone.outputs[0].text == answer.outputs[0].text
        got = [entry.logprob for entry in answer.outputs[0].logprobs or ()]
        expected = [entry.logprob for entry in alone.outputs[0].logprobs or ()]
        np.testing.assert_allclose(got, expected, atol=1e-4)


def test_stream_adds_up_to_the_answer(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    parts = list(llm.stream("the cat", params))
    (answer,) = llm.generate("the cat", params)
    assert merge_outputs(parts).outputs == answer.outputs
    assert answer.outputs[0].finish_reason == "length"
    assert len(answer.outputs[0].token_ids) == 12
    assert answer.metrics.time_to_first_token is not None


def test_interleaved_and_abandoned_streams(llm: LLM) -> None:
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    one, two, left = (llm.stream(p, params) for p in PROMPTS[:3])
    next(left)
    pairs = list(zip(one, two, strict=True))
    assert [p[0].outputs[0].token_ids for p in pairs] == [
        p.outputs[0].token_ids for p in llm.stream(PROMPTS[0], params)
    ]
    left.close()  # type: ignore[attr-defined]
    assert not llm.engine.has_unfinished
    stats = llm.engine.stats()
    assert stats.num_free_blocks == stats.num_blocks


def test_more_prompts_than_the_queue_takes(artifact: Path) -> None:
    with LLM(artifact, max_waiting=3) as llm:
        answers = llm.generate([[i % 7 + 2] for i in range(20)], SamplingParams(max_tokens=2))
    assert [a.prompt_token_ids[0] for a in answers] == [i % 7 + 2 for i in range(20)]


def test_stop_string_cuts_the_text(llm: LLM) -> None:
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    (whole,) = llm.generate("the cat", params)
    text = whole.outputs[0].text
    stop = text[9:12]
    (cut,) = llm.generate("the cat", SamplingParams(max_tokens=30, ignore_eos=True, stop=stop))
    assert cut.outputs[0].text == text[: text.index(stop)]
    assert cut.outputs[0].finish_reason == "stop"
    assert cut.outputs[0].stop_reason == stop
    assert not llm.engine.has_unfinished


def test_stop_token_ends_without_its_text(llm: LLM) -> None:
    (whole,) = llm.generate("the cat", SamplingParams(max_tokens=8, ignore_eos=True))
    tokens = whole.outputs[0].token_ids
    stop = next(t for t in tokens[1:] if t != tokens[0])
    at = tokens.index(stop)
    params = SamplingParams(max_tokens=8, ignore_eos=True, stop_token_ids=[stop])
    (cut,) = llm.generate("the cat", params)
    assert cut.outputs[0].token_ids == tokens[: at + 1]
    assert cut.outputs[0].stop_reason == stop
    assert llm.tokenizer is not None
    assert cut.outputs[0].text == llm.tokenizer.decode(tokens[:at])


def test_a_stop_string_that_is_a_special_token(llm: LLM) -> None:
    """It leaves no text to be found in: it ends the answer where it comes."""
    assert llm.tokenizer is not None
    turn = llm.tokenizer.backend.token_to_id("<|turn|>")
    params: dict[str, Any] = {"max_tokens": 5, "allowed_token_ids": [turn], "ignore_eos": True}
    for n in (1, 2):
        (answer,) = llm.generate("a", SamplingParams(**params, n=n, stop=["x", "<|turn|>"]))
        for output in answer.outputs:
            assert (output.finish_reason, output.stop_reason) == ("stop", "<|turn|>")
            assert (output.text, output.token_ids) == ("", (turn,))
    shown = SamplingParams(**params, stop="<|turn|>", skip_special_tokens=False)
    (answer,) = llm.generate("a", shown)
    assert (answer.outputs[0].text, answer.outputs[0].finish_reason) == ("", "stop")
    with pytest.raises(RequestError, match=r"contains the special token '<\|turn\|>'") as caught:
        llm.generate("a", SamplingParams(**params, stop="\n<|turn|>user"))
    assert caught.value.field == "stop"


def test_chat_takes_text_parts(llm: LLM) -> None:
    """As the server does; this template adds strings."""
    params = SamplingParams(max_tokens=1)
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "hat"}]
    for role in ("user", "developer"):
        answer = llm.chat([{"role": role, "content": parts, "name": None}], params)
        assert llm.tokenizer is not None
        plain = [{"role": role.replace("developer", "system"), "content": "the hat"}]
        assert list(answer.prompt_token_ids) == llm.tokenizer.encode_chat(plain)
    for wrong in ([{"type": "image"}], [{"type": "text"}], [5], 5, {"text": "a"}):
        with pytest.raises(RequestError, match=r"messages\[0\]\.content"):
            llm.chat([{"role": "user", "content": wrong}], params)


def test_chat_renders_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "the hat"}]
    answer = llm.chat(messages, SamplingParams(max_tokens=3))
    assert llm.tokenizer is not None
    text = llm.tokenizer.decode(answer.prompt_token_ids, skip_special_tokens=False)
    assert text == "<|turn|>user: the hat\n<|turn|>assistant: "


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_goes_to_a_terminal_on_stderr(
    llm: LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))
    llm.generate(PROMPTS, SamplingParams(max_tokens=2), progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("generate" in captured.err) is terminal
    assert ("4/4" in captured.err) is terminal


def test_params_under_their_other_name(llm: LLM) -> None:
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    chat = [{"role": "user", "content": "the hat"}]
    by_place = [
        llm.generate("the cat", params)[0],
        merge_outputs(list(llm.stream("the cat", params))),
        llm.chat(chat, params),
        merge_outputs(list(llm.stream_chat(chat, params))),
    ]
    by_name = [
        llm.generate("the cat", sampling_params=params)[0],
        merge_outputs(list(llm.stream("the cat", sampling_params=params))),
        llm.chat(chat, sampling_params=params),
        merge_outputs(list(llm.stream_chat(chat, sampling_params=params))),
    ]
    assert [answer.outputs for answer in by_name] == [answer.outputs for answer in by_place]
    assert all(len(answer.outputs[0].token_ids) == 3 for answer in by_name)
    with pytest.raises(RequestError, match="are the same: pass only one"):
        llm.generate("the cat", params, sampling_params=params)


def test_many_conversations_are_answered_at_once(llm: LLM) -> None:
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    params = [SamplingParams(max_tokens=2 + i, ignore_eos=True) for i in range(4)]
    answers = llm.chat(chats, params)
    for chat, each, answer in zip(chats, params, answers, strict=True):
        alone = llm.chat(chat, each)
        assert answer.outputs[0].token_ids == alone.outputs[0].token_ids
        assert answer.prompt_token_ids == alone.prompt_token_ids
        assert len(answer.outputs[0].token_ids) == each.max_tokens


def test_an_answer_that_goes_on_with_the_last_message(llm: LLM) -> None:
    chat = [{"role": "user", "content": "the hat"}, {"role": "assistant", "content": "the cat sat"}]
    answer = llm.chat(chat, SamplingParams(max_tokens=1), continue_final_message=True)
    assert llm.tokenizer is not None
    text = llm.tokenizer.decode(answer.prompt_token_ids, skip_special_tokens=False)
    assert text == "<|turn|>user: the hat\n<|turn|>assistant: the cat sat"
    closed = llm.chat(chat, SamplingParams(max_tokens=1), add_generation_prompt=False)
    text = llm.tokenizer.decode(closed.prompt_token_ids, skip_special_tokens=False)
    assert text == "<|turn|>user: the hat\n<|turn|>assistant: the cat sat\n"


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([], {}, "messages must be a list"),
        ("the hat", {}, "messages must be a list"),
        ([{"role": "user", "content": "a"}, []], {}, "mixes messages and conversations"),
        ([[]], {}, "at least one message"),
        ([{"content": "a"}], {}, "messages.0. has no role"),
        (
            [{"role": "user", "content": "a"}],
            {"continue_final_message": True, "add_generation_prompt": True},
            "cannot both continue",
        ),
        (
            [{"role": "assistant", "tool_calls": []}],
            {"continue_final_message": True},
            "no text to continue",
        ),
    ],
)
def test_bad_conversations_are_refused(
    llm: LLM, messages: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        llm.chat(messages, **options)


def test_a_keyword_that_no_template_takes(llm: LLM) -> None:
    with pytest.raises(TypeError, match="chat has no parameter 'continue_message'"):
        llm.chat([{"role": "user", "content": "a"}], continue_message=True)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "no tokens"),
        ([-1], "not a token id"),
        ([2**31], "not a token id"),
        ([True], "not a token id"),
        ([1.5], "not a token id"),
        ("\ud800", "not valid Unicode"),
        ([1] * 96, "the prompt has 96 tokens"),
    ],
)
def test_bad_prompts_are_refused(llm: LLM, prompt: str | list[int], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        llm.generate(["the cat", prompt])
    assert caught.value.where == "prompts[1]", "which of the list it was"
    with pytest.raises(RequestError, match=message) as caught:
        llm.generate([prompt])
    assert caught.value.where is None
    assert not llm.engine.has_unfinished
    assert len(llm.generate("the", SamplingParams(max_tokens=2))) == 1


@pytest.mark.parametrize(
    "params",
    [SamplingParams(max_tokens=96), SamplingParams(stop_token_ids=[100_000])],
)
def test_params_out_of_the_models_range(llm: LLM, params: SamplingParams) -> None:
    with pytest.raises(RequestError):
        llm.generate("the cat", params)
    assert not llm.engine.has_unfinished


@pytest.mark.parametrize(
    "extra", [{"priority": "high"}, {"priority": True}, {"cache_salt": "x" * 257}]
)
def test_bad_priority_or_salt_is_refused(llm: LLM, extra: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        llm.engine.add_request("r", [5], **extra)
    assert caught.value.field in extra
    assert not llm.engine.has_unfinished


def test_token_ids_only_without_tokenizer(tmp_path: Path) -> None:
    with LLM(write_small_artifact(tmp_path / "bare", with_tokenizer=False)) as llm:
        (answer,) = llm.generate([5, 6, 7], SamplingParams(max_tokens=4))
        assert len(answer.outputs[0].token_ids) == 4
        assert answer.outputs[0].text == ""
        calls: list[Callable[[], object]] = [
            lambda: llm.generate("text"),
            lambda: llm.generate([5], SamplingParams(stop="x")),
            lambda: llm.chat([{"role": "user", "content": "x"}]),
            lambda: llm.stream_chat([{"role": "user", "content": "x"}]),
            lambda: llm.score("text"),
            lambda: llm.score([5], "text"),
            lambda: llm.embed("text"),
        ]
        for call in calls:
            with pytest.raises(RequestError, match="no tokenizer"):
                call()
        assert len(llm.score([5, 6])[0].logprobs) == len(llm.embed([5, 6])) == 1


def test_no_chat_without_a_template(tmp_path: Path) -> None:
    path = write_small_artifact(tmp_path / "plain", with_template=False)
    messages = [{"role": "user", "content": "the hat"}]
    with LLM(path) as llm:
        calls: list[Callable[[], object]] = [
            lambda: llm.chat(messages),
            lambda: llm.chat([messages]),
            lambda: llm.stream_chat(messages),
        ]
        for call in calls:
            with pytest.raises(RequestError, match=r"no chat template \(format the prompt your"):
                call()


@pytest.mark.parametrize(
    ("limits", "hint"),
    [
        ({"kv_memory": "10KiB", "max_context": 96}, r"\(--kv-memory, or .*\) to at least"),
        ({"kv_memory": "1KiB"}, r"raise kv_memory \(--kv-memory, or .*\) to at least"),
        ({"max_context": 97}, "compile with runtime.max_context"),
        ({"step_tokens": 17}, "compile with runtime.step_tokens"),
    ],
)
def test_what_does_not_fit_says_what_would(
    artifact: Path, limits: dict[str, Any], hint: str
) -> None:
    with pytest.raises(CapacityError, match=hint):
        LLM(artifact, **limits)


def test_a_smaller_pool_lowers_the_context_and_says_so(artifact: Path) -> None:
    with pytest.warns(UserWarning, match="max_context is reduced to") as caught:
        llm = LLM(artifact, kv_memory="10KiB")
    assert caught[0].filename == __file__
    with llm:
        held = llm.engine.plan.limits.max_context
        assert 2 <= held < 96
        assert str(held) in str(caught[0].message)
        (answer,) = llm.generate("the", SamplingParams(ignore_eos=True))
        assert len(answer.prompt_token_ids) + len(answer.outputs[0].token_ids) == held


def test_what_a_longer_prompt_needs(artifact: Path) -> None:
    with (
        LLM(artifact) as llm,
        pytest.raises(RequestError, match=r"compile with a larger runtime\.max_context"),
    ):
        llm.generate([[5] * 96])
    lowered: list[dict[str, Any]] = [{"max_context": 40}, {"kv_memory": "10KiB"}]
    for limits in lowered:
        notes: list[str] = []
        with (
            LLM(artifact, on_note=notes.append, **limits) as llm,
            pytest.raises(RequestError, match="more max_context or KV memory: compiled is 96"),
        ):
            llm.generate([[5] * 95])
        assert bool(notes) is ("kv_memory" in limits)


def test_runtime_imports_without_torch() -> None:
    script = (
        "import sys, infc, infc.runtime.text.chat_template, infc.runtime.async_engine;"
        "compiler = {'compile', 'ops', 'register_pass', 'rewrite'};"
        "[getattr(infc, name) for name in infc.__all__ if name not in compiler];"
        "print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.parametrize("params", [{"max_tokens": 3}, {}, [{"max_tokens": 3}], "greedy", 3])
def test_parameters_of_another_kind(llm: LLM, params: Any) -> None:
    with pytest.raises(RequestError, match="params must be SamplingParams, not") as caught:
        llm.generate("the cat", params)
    assert caught.value.field == "params"
    with pytest.raises(RequestError, match="3 params were given for 2 prompts"):
        llm.generate(["the", "cat"], [SamplingParams()] * 3)


def test_a_limit_that_nobody_knows(artifact: Path) -> None:
    with pytest.raises(
        UsageError, match=r"has no option 'max_contxt' \(did you mean 'max_context'\?"
    ):
        LLM(artifact, max_contxt=10)
    with pytest.raises(
        UsageError, match=r"has no option 'foo' \(options: verify, on_note, max_con"
    ):
        LLM(artifact, foo=1)


def test_a_way_to_verify_that_nobody_knows(artifact: Path) -> None:
    """Of an artifact that is open already, too."""
    with pytest.raises(UsageError, match="verify is 'all'"):
        LLM(open_artifact(artifact), verify="all")  # type: ignore[arg-type]


def test_more_prompts_than_may_wait_while_some_are_preempted(artifact: Path) -> None:
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    with LLM(artifact) as roomy:
        expected = [answer.outputs for answer in roomy.generate(PROMPTS * 6, params)]
    with LLM(artifact, max_waiting=2, max_context=64, kv_memory=20_000) as llm:
        answers = llm.generate(PROMPTS * 6, params)
        assert llm.engine.stats().num_preemptions > 0
    assert [answer.outputs for answer in answers] == expected
