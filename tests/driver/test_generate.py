"""Writing an answer as it comes: the text, the ids, the counts, and where a prompt comes from."""

import io
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from infc.driver import text_input
from infc.driver.conversation import _read_line
from infc.driver.generate import Written, write_choices, write_stream
from infc.driver.sampling_options import (
    generation_options,
    sampling_params,
    with_default_length,
)
from infc.ir.artifact import ArtifactWriter, open_artifact
from infc.ir.errors import InfcError, RequestError, UsageError
from infc.ir.manifest import TokenizerFiles
from infc.runtime.requests.outputs import CompletionOutput, RequestMetrics, RequestOutput
from infc.runtime.sampling.sampling_params import SamplingParams

from ..ir.artifacts import fill, manifest


def part(
    text: str, *tokens: int, end: str | None = None, error: str | None = None
) -> RequestOutput:
    completion = CompletionOutput(text=text, token_ids=tokens, finish_reason=end)  # type: ignore[arg-type]
    metrics = RequestMetrics(arrival_time=0.0)
    return RequestOutput(
        request_id="0",
        prompt_token_ids=(1, 2, 3),
        outputs=(completion,),
        metrics=metrics,
        error=error,
    )


def test_pieces_are_written_as_they_come() -> None:
    sink, seen = io.StringIO(), []

    def parts() -> Iterator[RequestOutput]:
        for piece in (part("", 5), part("né", 6, 7), part("!", 8, end="stop")):
            yield piece
            seen.append(sink.getvalue())

    written = write_stream(parts(), sink)
    assert seen == ["", "né", "né!"]
    assert (written.text, written.num_tokens, written.num_prompt_tokens) == ("né!", 4, 3)
    assert written.finish_reason == "stop"
    summary = written.summary(0.5)
    assert summary.startswith("3 prompt tokens, 4 tokens, ")
    assert "(0.50 s from process start), ended by stop" in summary


def test_token_ids_where_there_is_no_tokenizer() -> None:
    sink = io.StringIO()
    written = write_stream([part("", 5), part("", 6, end="length")], sink, as_ids=True)
    assert sink.getvalue() == written.text == "5 6 "


def test_a_file_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_input, "_MAX_FILE_BYTES", 1 << 20)
    with pytest.raises(UsageError, match="larger than 1 MiB"):
        text_input.read_file("/dev/zero")
    assert text_input.read_file("/dev/zero", 3) == "\0\0\0"


def test_one_of_each_is_counted_as_one() -> None:
    summary = Written("a", 1, 1, 0.1, 0.0, "length").summary()
    assert summary.startswith("1 prompt token, 1 token, first")


def test_nothing_generated() -> None:
    written = write_stream([part("", end="stop")], io.StringIO())
    assert written.num_tokens == 0
    assert "tokens/s" not in written.summary()


def test_a_request_that_failed() -> None:
    with pytest.raises(InfcError, match="the logits hold NaN"):
        write_stream([part("", end="error", error="the logits hold NaN")], io.StringIO())


class _Input(io.TextIOWrapper):
    def __init__(self, data: bytes, terminal: bool) -> None:
        super().__init__(io.BytesIO(data))
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def test_where_the_prompt_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    assert text_input.read_prompt("hello") == "hello"
    for prompt in (None, "-"):
        monkeypatch.setattr(sys, "stdin", _Input("grüß\n".encode(), terminal=False))
        assert text_input.read_prompt(prompt) == "grüß\n"
    monkeypatch.setattr(sys, "stdin", _Input(b"", terminal=True))
    with pytest.raises(UsageError, match="no prompt"):
        text_input.read_prompt(None)
    monkeypatch.setattr(sys, "stdin", _Input(b"\xff", terminal=False))
    with pytest.raises(UsageError, match="not UTF-8"):
        text_input.read_prompt("-")


@pytest.mark.parametrize(
    ("generation", "temperature"),
    [(None, 0.0), ({"temperature": 0.7}, 0.0), ({"do_sample": True, "temperature": 0.7}, 0.7)],
)
def test_what_the_checkpoint_recommends(
    tmp_path: Path, generation: dict[str, object] | None, temperature: float
) -> None:
    tokenizer = TokenizerFiles("tokenizer/tokenizer.json", None, (2,), None, generation)
    with ArtifactWriter(tmp_path / "a") as writer:
        fill(writer.path)
        writer.commit(replace(manifest(), tokenizer=tokenizer))
    artifact = open_artifact(tmp_path / "a")
    options = {"temperature": None, "stop": (), "top_k": 5, "max_tokens": None}
    params = sampling_params(options, artifact)
    assert (params.temperature, params.top_k, params.max_tokens) == (temperature, 5, None)
    given = sampling_params({**options, "temperature": 0.0, "max_tokens": 3}, artifact)
    assert (given.temperature, given.max_tokens) == (0.0, 3)
    with pytest.raises(RequestError, match="top_k"):
        sampling_params({"top_k": -1}, artifact)


@pytest.mark.parametrize(
    ("given", "num_prompt_tokens", "length"),
    [(None, 10, 256), (None, 900, 100), (None, 1000, 1), (500, 900, 500)],
)
def test_only_a_length_that_was_asked_for_may_be_too_long(
    given: int | None, num_prompt_tokens: int, length: int
) -> None:
    params = with_default_length(SamplingParams(max_tokens=given), num_prompt_tokens, 1000)
    assert params.max_tokens == length


def test_a_length_is_never_less_than_the_least() -> None:
    assert with_default_length(SamplingParams(min_tokens=300), 10, 1000).max_tokens == 300


def test_every_way_to_sample_is_an_option() -> None:
    """What the parameters have and a terminal has a use for, under the same name."""
    seen: dict[str, Any] = {}

    @click.command()
    @generation_options("short")
    def command(**options: Any) -> None:
        seen.update(options)

    texts = {
        "temperature": "0.5",
        "top_p": "0.9",
        "top_k": "7",
        "min_p": "0.1",
        "repetition_penalty": "1.2",
        "presence_penalty": "-1",
        "frequency_penalty": "0.5",
        "allowed_token_ids": "1,2,3",
        "banned_token_ids": "3",
        "seed": "4",
        "max_tokens": "9",
        "min_tokens": "2",
        "stop": "x",
        "stop_token_ids": "5 6",
        "logit_bias": "42=-1.5",
    }
    words = [f"--{name.replace('_', '-')}={text}" for name, text in texts.items()]
    result = CliRunner().invoke(
        command, [*words, "--ignore-eos"], help_option_names=["-h", "--help"]
    )
    assert result.exit_code == 0, result.output
    names = {field.name for field in fields(SamplingParams)}
    answered = {"logprobs", "prompt_logprobs", "skip_special_tokens", "n", "best_of"}
    assert names - answered == texts.keys() | {"ignore_eos"}
    params = SamplingParams(**{name: seen[name] for name in names - answered})
    assert params.bias_pairs == ((42, -1.5),)
    assert params.allowed_token_ids == (1, 2, 3)
    assert params.stop_token_ids == (5, 6)
    assert (params.presence_penalty, params.min_p, params.ignore_eos) == (-1.0, 0.1, True)


@pytest.mark.parametrize(
    "words", [["--banned-token-ids", "a"], ["--logit-bias", "5"], ["--allowed-token-ids", ""]]
)
def test_ids_that_are_none(words: list[str]) -> None:
    command = click.command()(generation_options("short")(lambda **_: None))
    result = CliRunner().invoke(command, words, help_option_names=["-h", "--help"])
    assert result.exit_code == 2
    assert "such as" in result.output


def test_several_answers_are_numbered() -> None:
    def piece(index: int, text: str, *tokens: int, end: str | None = None) -> CompletionOutput:
        return CompletionOutput(index=index, text=text, token_ids=tokens, finish_reason=end)  # type: ignore[arg-type]

    steps = [
        (piece(0, "a", 1), piece(1, "b", 2)),
        (piece(0, "c", 3, end="stop"), piece(1, "d", 4, end="length")),
    ]
    times = RequestMetrics(arrival_time=1.0, first_token_time=3.0, finished_time=7.0)
    parts = [replace(part(""), outputs=outputs, metrics=times) for outputs in steps]
    sink = io.StringIO()
    written = write_choices(parts, sink)
    assert sink.getvalue() == written.text == "[1] ac\n[2] bd"
    assert (written.num_tokens, written.finish_reason) == (4, "stop, length")
    assert (written.first_token_seconds, written.decode_seconds) == (2.0, 4.0)
    sink = io.StringIO()
    assert write_choices(parts, sink, as_ids=True).text == "[1] 1 3\n[2] 2 4"
    with pytest.raises(InfcError, match="NaN"):
        write_choices([part("", end="error", error="NaN")], io.StringIO())


def test_a_dropped_line_of_a_conversation_does_not_end_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", _Input(b"", terminal=True))
    monkeypatch.setattr("builtins.input", interrupted)
    assert _read_line() == ""
    assert "Ctrl-D or /exit ends" in capsys.readouterr().out


def test_the_best_of_several_has_a_speed() -> None:
    whole = part("one two", 1, 2, 3, end="length")
    times = RequestMetrics(arrival_time=1.0, first_token_time=2.0, finished_time=4.0)
    written = write_stream([replace(whole, metrics=times)], io.StringIO())
    assert written.decode_seconds == 2.0
    assert "1.0 tokens/s" in written.summary()
