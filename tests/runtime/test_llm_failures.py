"""LLM where something fails: weights, steps, logits, interrupts, use after the end."""

from __future__ import annotations

import asyncio
import copy
import pickle
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from infc.ir.errors import (
    ArtifactError,
    InfcError,
    UsageError,
)
from infc.runtime.api.async_llm import AsyncLLM
from infc.runtime.api.llm import LLM
from infc.runtime.executors.base import Running
from infc.runtime.requests.outputs import RequestOutput
from infc.runtime.sampling.sampling_params import SamplingParams
from infc.runtime.scheduling.step import NO_TOKEN, Step

from .executors import Wrapped, owners_in_flight
from .small_artifact import write_small_artifact

PROMPTS = ["the cat", "the hat sat on the mat and the cat", "the", "für 你好 🙂"]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_artifact(tmp_path_factory.mktemp("llm") / "small")


def test_damaged_weights_give_no_token(tmp_path: Path) -> None:
    path = write_small_artifact(tmp_path / "damaged")
    weights = path / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with LLM(path) as llm, pytest.raises(ArtifactError):
        llm.generate("the", SamplingParams(max_tokens=1))


def test_failed_step_ends_its_requests_and_no_other(artifact: Path) -> None:
    class Failing(Wrapped):
        def launch(self, step: Step) -> Running:
            raise InfcError("the step failed")

    with LLM(artifact) as llm:
        working = llm.engine.executor
        llm.engine.executor = Failing(working)
        with pytest.raises(InfcError, match="the step failed"):
            llm.generate(PROMPTS)
        llm.engine.executor = working
        assert not llm.engine.has_unfinished
        assert len(llm.generate("the cat", SamplingParams(max_tokens=2))) == 1
        stats = llm.engine.stats()
        assert stats.num_free_blocks == stats.num_blocks


def test_request_with_invalid_logits_fails_alone(artifact: Path) -> None:
    with LLM(artifact) as llm:
        working = llm.engine.executor

        class Poisoned(Wrapped):
            def launch(self, step: Step) -> Running:
                running = self.inner.launch(step)
                for place, request in enumerate(owners_in_flight(llm.engine).sampled):
                    if request.token_ids[0] == 9:
                        running.result().tokens[place] = NO_TOKEN
                return running

        params = SamplingParams(max_tokens=5, ignore_eos=True)
        (good,) = llm.generate([[5, 6]], params)
        llm.engine.executor = Poisoned(working)
        bad, again = llm.generate([[9, 6], [5, 6]], params)
        llm.engine.executor = working
    assert bad.outputs[0].finish_reason == "error"
    assert bad.error == "the logits hold no finite value"
    assert again.outputs[0].token_ids == good.outputs[0].token_ids


def test_nothing_runs_after_the_end(artifact: Path) -> None:
    llm = LLM(artifact)
    llm.close()
    llm.close()
    calls: list[Callable[[], object]] = [
        lambda: llm.generate("the cat"),
        lambda: llm.generate([]),
        lambda: next(llm.stream("the cat")),
        lambda: llm.chat([{"role": "user", "content": "the hat"}]),
    ]
    for call in calls:
        with pytest.raises(InfcError, match="this LLM is closed"):
            call()


def test_a_stream_does_not_outlive_its_model(artifact: Path) -> None:
    with LLM(artifact) as llm:
        stream = llm.stream("the cat", SamplingParams(ignore_eos=True))
        next(stream)
    with pytest.raises(InfcError, match="this LLM is closed"):
        next(stream)


def test_an_interrupt_anywhere_in_a_step(artifact: Path) -> None:
    """Ctrl-C between any two lines of a step: the next request is served as if it never came."""
    watched = ("engine.py", "in_flight.py", "scheduler.py", "kv_cache.py", "blocks.py")
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    with LLM(artifact) as llm:
        expected = llm.generate(PROMPTS, params)

        def interrupt_after(lines: int) -> bool:
            left = lines

            def trace(frame: FrameType, event: str, _: Any) -> Any:
                nonlocal left
                if not frame.f_code.co_filename.endswith(watched):
                    return None
                if event == "line":
                    left -= 1
                    if left == 0:
                        raise KeyboardInterrupt
                return trace

            for prompt in PROMPTS:
                llm.engine.add_request(prompt, prompt, params)
            sys.settrace(trace)
            try:
                llm.engine.step()
            except KeyboardInterrupt:
                return True
            finally:
                sys.settrace(None)
                llm.engine.abort_all()
            return False

        lines = 1
        while interrupt_after(lines):
            llm.engine.scheduler.check()
            assert not llm.engine.has_unfinished
            lines += 11
        assert lines > 500
        answers = llm.generate(PROMPTS, params)
    assert [a.outputs for a in answers] == [a.outputs for a in expected]


def test_a_second_thread_is_kept_out(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(artifact) as llm:
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        expected = llm.generate("the cat", params)
        inside, leave = threading.Event(), threading.Event()
        launch = llm.engine.executor.launch

        def held(step: Step) -> Running:
            inside.set()
            assert leave.wait(30)
            return launch(step)

        monkeypatch.setattr(llm.engine.executor, "launch", held)
        answers: list[RequestOutput] = []
        first = threading.Thread(target=lambda: answers.extend(llm.generate("the cat", params)))
        first.start()
        assert inside.wait(30)
        with pytest.raises(InfcError, match="another thread is in this engine"):
            llm.engine.step()
        leave.set()
        first.join(30)
    assert [a.outputs for a in answers] == [a.outputs for a in expected]


@pytest.mark.parametrize("kind", [LLM, AsyncLLM])
@pytest.mark.parametrize("act", [pickle.dumps, copy.copy, copy.deepcopy])
def test_it_cannot_be_sent_to_other_processes(
    artifact: Path, kind: type[LLM | AsyncLLM], act: Callable[[object], object]
) -> None:
    """As spawned workers, Ray and Spark do; the error is ours, and says what to do."""
    llm = kind(artifact)
    with pytest.raises(UsageError, match=f"^{kind.__name__} cannot be pickled or copied") as caught:
        act(llm)
    assert "in each process" in (caught.value.hint or "")
    llm.close() if isinstance(llm, LLM) else asyncio.run(llm.close())
