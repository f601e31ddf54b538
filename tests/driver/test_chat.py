"""A conversation survives what one of its messages did not."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from infc.driver.commands import chat
from infc.ir.errors import InfcError
from infc.runtime.api.llm import LLM
from infc.runtime.engine import Engine
from infc.runtime.requests.outputs import RequestOutput

from ..runtime.small_artifact import write_small_artifact

Turns = list[tuple[str, str]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_artifact(tmp_path_factory.mktemp("chat") / "small")


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the model was given for each message, as text."""
    seen: list[str] = []
    stream = LLM.stream

    def listen(self: LLM, prompt: Any, *args: Any, **options: Any) -> Iterator[RequestOutput]:
        assert self.tokenizer is not None
        seen.append(self.tokenizer.decode(prompt))
        return stream(self, prompt, *args, **options)

    monkeypatch.setattr(LLM, "stream", listen)
    return seen


def say(artifact: Path, *lines: str) -> Result:
    words = [str(artifact), "--max-tokens", "4", "--ignore-eos"]
    said = io.BytesIO("".join(f"{line}\n" for line in lines).encode())
    return CliRunner().invoke(chat.command, words, input=said, help_option_names=["-h", "--help"])


def test_a_message_that_is_refused_leaves_the_conversation(
    artifact: Path, prompts: list[str]
) -> None:
    result = say(artifact, "the cat", "the hat " * 200, "the mat")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("error: the prompt has ")
    assert "dropped" not in result.stderr
    assert prompts[2].startswith(prompts[0]), "what was said before is still there"
    assert "hat" not in prompts[2]


def test_an_answer_that_fails_leaves_the_conversation(
    artifact: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step, steps = Engine.step, iter(range(1000))

    def fail_once(self: Engine) -> list[RequestOutput]:
        if next(steps) == 6:  # in the second of the answers, each of four steps
            raise InfcError("the step failed: a reason")
        return step(self)

    monkeypatch.setattr(Engine, "step", fail_once)
    result = say(artifact, "the cat", "the hat", "the mat")
    assert result.exit_code == 0, result.output
    assert result.stderr == "error: the step failed: a reason\n"
    assert result.stdout.count("\n") >= 3
    assert prompts[2].startswith(prompts[0])
    assert "hat" not in prompts[2]


def test_the_oldest_turns_give_way_to_a_message_that_is_answered(
    artifact: Path, prompts: list[str]
) -> None:
    result = say(artifact, "the cat", *["on the hat"] * 6)
    assert result.exit_code == 0, result.output
    assert result.stderr == "note: the context is full, so the oldest turns are dropped\n"
    assert "cat" in prompts[1]
    assert "cat" not in prompts[-1]
    assert len(prompts) == 7
