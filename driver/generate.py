"""Writes an answer as it comes, and counts what it took."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

import click

from ..ir.errors import InfcError
from ..ir.sizes import format_count

if TYPE_CHECKING:
    from ..runtime.api.llm import LLM
    from ..runtime.requests.outputs import RequestOutput
    from ..runtime.sampling.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Written:
    """What was written, and how fast. Times in seconds."""

    text: str
    num_prompt_tokens: int
    num_tokens: int
    first_token_seconds: float
    decode_seconds: float
    finish_reason: str | None

    def summary(self, process_seconds: float | None = None) -> str:
        """One line for people. `process_seconds`: from process start to the first token."""
        parts = [
            format_count(self.num_prompt_tokens, "prompt token"),
            format_count(self.num_tokens, "token"),
        ]
        if self.num_tokens > 1 and self.decode_seconds > 0:
            parts.append(f"{(self.num_tokens - 1) / self.decode_seconds:.1f} tokens/s")
        parts.append(f"first token after {self.first_token_seconds:.3f} s")
        if process_seconds is not None:
            parts[-1] += f" ({process_seconds:.2f} s from process start)"
        return ", ".join([*parts, f"ended by {self.finish_reason}"])


def write_stream(
    outputs: Iterable[RequestOutput], sink: TextIO, *, as_ids: bool = False
) -> Written:
    """Writes the pieces of one answer to `sink` at once as they come.

    `as_ids` writes token ids, for a model without a tokenizer. Raises InfcError where the
    request failed on its way.
    """
    start = time.perf_counter()
    first = last = times = None
    pieces: list[str] = []
    num_prompt = num_tokens = 0
    reason = None
    for output in outputs:
        if output.error is not None:
            raise InfcError(output.error)
        piece, times = output.outputs[0], output.metrics
        num_prompt = len(output.prompt_token_ids)
        num_tokens += len(piece.token_ids)
        reason = piece.finish_reason
        if piece.token_ids:
            last = time.perf_counter()
            first = first or last
        text = "".join(f"{token} " for token in piece.token_ids) if as_ids else piece.text
        pieces.append(text)
        sink.write(text)
        sink.flush()
    now = time.perf_counter()
    first, last = first or now, last or now
    if first == last and num_tokens > 1 and times is not None and times.finished_time is not None:
        # The best of several comes as a whole, at the end: the engine knows better.
        start = times.arrival_time
        first, last = times.first_token_time or times.finished_time, times.finished_time
    return Written("".join(pieces), num_prompt, num_tokens, first - start, last - first, reason)


def write_choices(
    outputs: Iterable[RequestOutput], sink: TextIO, *, as_ids: bool = False
) -> Written:
    """Writes several answers to one prompt to `sink`, numbered, once all are there.

    Raises InfcError where the request failed on its way.
    """
    from ..runtime.requests.outputs import merge_outputs

    whole = merge_outputs(list(outputs))
    if whole.error is not None:
        raise InfcError(whole.error)
    texts = [" ".join(map(str, c.token_ids)) if as_ids else c.text for c in whole.outputs]
    text = "\n".join(f"[{number}] {text}" for number, text in enumerate(texts, 1))
    sink.write(text)
    sink.flush()
    # Of several, the first may come only when the last has ended: the engine knows better.
    times = whole.metrics
    first, last = times.first_token_time, times.finished_time
    return Written(
        text,
        len(whole.prompt_token_ids),
        sum(len(choice.token_ids) for choice in whole.outputs),
        times.time_to_first_token or 0.0,
        last - first if first is not None and last is not None else 0.0,
        ", ".join(dict.fromkeys(str(choice.finish_reason) for choice in whole.outputs)),
    )


def write_answer(llm: LLM, ids: list[int], params: SamplingParams, *, stats: bool) -> None:
    """Writes the answer to a prompt to stdout and, with `stats`, the speed to stderr."""
    begun = seconds_since_process_start()
    stream = llm.stream(ids, params)
    write = write_stream if params.n == 1 else write_choices
    written = write(stream, sys.stdout, as_ids=llm.tokenizer is None)
    click.echo()
    if stats:
        click.echo(written.summary(begun + written.first_token_seconds), err=True)


def encode_message(llm: LLM, text: str, system: str | None = None) -> list[int]:
    """The tokens of a chat with an optional system message and one user message.

    RequestError if the model has no tokenizer or no chat template.
    """
    from ..runtime.api.prompts import encode_conversation

    opening = [{"role": "system", "content": system}] if system else []
    return encode_conversation(llm.tokenizer, [*opening, {"role": "user", "content": text}])


def seconds_since_process_start() -> float:
    """Wall seconds since the system started this process, to a hundredth."""
    with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
        # After the name in parentheses, which may hold anything: field 22 is the start, in ticks.
        fields = file.read().rpartition(")")[2].split()
    ticks = int(fields[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
