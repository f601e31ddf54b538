"""A chat in the terminal, for `infc chat` and for `infc run` without a prompt."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

import click

from .stop_signals import stop_was_handled

if TYPE_CHECKING:
    from ..runtime.api.llm import LLM
    from ..runtime.sampling.sampling_params import SamplingParams


def converse(llm: LLM, params: SamplingParams, system: str | None = None) -> None:
    """Reads messages from stdin line by line, and streams the answers to stdout.

    `system` is the system message. Ends at /exit or at the end of the input.
    """
    opening = [{"role": "system", "content": system}] if system else []
    turns: list[dict[str, Any]] = []
    told = False
    while (line := _read_line()) is not None:
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            turns, told = [], False
            click.echo("[new chat]", err=True)
        elif re.fullmatch(r"/\w*", line):
            click.echo("/reset starts a new chat, /exit or Ctrl-D ends it", err=True)
        elif line.strip():
            asked = [*turns, {"role": "user", "content": line}]
            answered = _answer(llm, params, opening, asked)
            if answered is None:
                continue  # what was said before stays as it was
            turns = answered
            if len(turns) <= len(asked) and not told:
                told = True
                click.echo("note: the context is full, so the oldest turns are dropped", err=True)


def _fitting(
    llm: LLM,
    params: SamplingParams,
    opening: list[dict[str, Any]],
    turns: list[dict[str, Any]],
) -> tuple[list[dict[str, Any]], list[int]]:
    """The newest turns behind which an answer fits, the last one in any case; and their tokens."""
    assert llm.tokenizer is not None
    limit = llm.engine.plan.limits.max_context
    room = params.max_tokens or min(256, limit // 4)
    for first in range(0, len(turns), 2):  # a message and its answer
        ids = llm.tokenizer.encode_chat([*opening, *turns[first:]])
        if len(ids) + room <= limit:
            break
    return turns[first:], ids


def _answer(
    llm: LLM,
    params: SamplingParams,
    opening: list[dict[str, Any]],
    turns: list[dict[str, Any]],
) -> list[dict[str, Any]] | None:
    """Writes one answer; the turns it was given behind, and it. None where there is none.

    It is refused, it failed, or it was stopped: only for a damaged artifact that is an error of
    the conversation.
    """
    from ..ir.errors import ArtifactError, CapacityError, InfcError, RequestError
    from .generate import write_stream

    try:
        kept, ids = _fitting(llm, params, opening, turns)
        written = write_stream(llm.stream(ids, params), sys.stdout)
    except (RequestError, CapacityError) as error:  # before its first word
        click.echo(f"error: {error}", err=True)
        return None
    except ArtifactError:
        raise
    except InfcError as error:
        click.echo()
        click.echo(f"error: {error}", err=True)
        return None
    except KeyboardInterrupt:
        stop_was_handled()
        click.echo(" [stopped]")
        return None
    click.echo()
    return [*kept, {"role": "assistant", "content": written.text}]


def _read_line() -> str | None:
    """One line, with editing and history on a terminal; None at the end."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - importing it is what gives `input` its editing
    try:
        return input("> ")
    except EOFError:
        click.echo()
        return None
    except KeyboardInterrupt:
        stop_was_handled()
        click.echo("\n(Ctrl-D or /exit ends)")
        return ""
