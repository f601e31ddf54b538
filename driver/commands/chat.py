"""`infc chat`: a conversation in the terminal."""

import sys
from typing import TYPE_CHECKING, Any

import click

from ..sampling_options import generation_options

if TYPE_CHECKING:
    from ...runtime.llm import LLM
    from ...runtime.sampling_params import SamplingParams


@click.command("chat")
@click.argument("artifact")
@click.option("--system", metavar="TEXT", help="The system message.")
@generation_options
def command(artifact: str, system: str | None, **options: Any) -> None:
    """Talk with a model.

    A line is a message; /reset begins anew, /exit or Ctrl-D ends. Ctrl-C stops an answer.

    \b
      infc chat tiny.infc
      infc chat tiny.infc --system "You write Python." --temperature 0.7
    """
    from ...ir.artifact import open_artifact
    from ...ir.errors import UsageError
    from ...runtime.llm import LLM
    from ..sampling_options import engine_arguments, sampling_params

    verify = options.pop("verify")
    opened = open_artifact(artifact, verify, weights="later")
    arguments = engine_arguments(options)
    params = sampling_params(options, opened, max_tokens=None)
    with LLM(opened, **arguments) as llm:
        if llm.tokenizer is None or not llm.tokenizer.has_chat_template:
            raise UsageError(
                "this model has no chat template", where=artifact, hint="try `infc generate`"
            )
        for note in llm.engine.plan.notes:
            click.echo(f"note: {note}", err=True)
        _converse(llm, params, [{"role": "system", "content": system}] if system else [])


def _converse(llm: "LLM", params: "SamplingParams", opening: list[dict[str, Any]]) -> None:
    messages = list(opening)
    while (line := _read_line()) is not None:
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            messages = list(opening)
        elif line.strip():
            messages.append({"role": "user", "content": line})
            answer = _answer(llm, params, messages)
            if answer is None:
                messages.pop()
            else:
                messages.append({"role": "assistant", "content": answer})


def _answer(llm: "LLM", params: "SamplingParams", messages: list[dict[str, Any]]) -> str | None:
    """Writes one answer; None where it was refused or stopped."""
    from ...ir.errors import CapacityError, RequestError
    from ..generate import write_stream

    try:
        written = write_stream(llm.stream_chat(messages, params), sys.stdout)
    except (RequestError, CapacityError) as error:
        click.echo(f"error: {error} (/reset begins anew)", err=True)
        return None
    except KeyboardInterrupt:
        click.echo(" [stopped]")
        return None
    click.echo()
    return written.text


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
