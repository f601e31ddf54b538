"""`infc generate`: a prompt in, text out as it comes."""

import sys
from typing import TYPE_CHECKING, Any

import click

from ..sampling_options import generation_options, parse_token_ids

if TYPE_CHECKING:
    from ...runtime.llm import LLM


@click.command("generate")
@click.argument("artifact")
@click.argument("prompt", required=False)
@click.option(
    "--token-ids", callback=parse_token_ids, metavar="1,2,3", help="The prompt as token ids."
)
@click.option(
    "--chat/--raw",
    default=False,
    help="Whether the prompt is a message for the chat template, or the text itself (default).",
)
@click.option("-n", "n", type=int, help="Answers; more than one come numbered, at the end.")
@click.option("--best-of", type=int, help="Generate so many, and keep the likeliest.")
@click.option("--stats/--no-stats", default=True, show_default=True, help="Speed, on stderr.")
@generation_options("256, or what the context leaves")
def command(
    artifact: str,
    prompt: str | None,
    token_ids: tuple[int, ...] | None,
    chat: bool,
    stats: bool,
    **options: Any,
) -> None:
    """Write what follows a prompt.

    The prompt is read from stdin where it is - or left out.

    \b
      infc generate tiny.infc "def fibonacci(n):" --max-tokens 64
      echo "Once upon a time" | infc generate tiny.infc --temperature 0.8 --seed 7
      infc generate tiny.infc --chat "Write a class for a stack."
      infc generate tiny.infc --token-ids 1,15,27
      infc generate tiny.infc "import" -n 3 --temperature 0.8 --min-p 0.05
    """
    from ...ir.artifact import open_artifact
    from ...runtime.llm import LLM
    from ..generate import read_prompt, seconds_since_process_start, write_choices, write_stream
    from ..sampling_options import (
        engine_arguments,
        print_note,
        sampling_params,
        with_default_length,
    )

    if token_ids is not None and (prompt is not None or chat):
        raise click.UsageError("--token-ids stands alone: no prompt and no --chat beside it")
    what = list(token_ids) if token_ids is not None else read_prompt(prompt)
    verify = options.pop("verify")
    opened = open_artifact(artifact, verify, weights="later")
    arguments = engine_arguments(options)
    params = sampling_params(options, opened)
    if params.num_choices > 1 and params.temperature == 0:
        print_note("temperature 0 takes the likeliest token, so all answers are equal")
    with LLM(opened, **arguments) as llm:
        begun = seconds_since_process_start()
        ids = llm.engine.encode(what) if not chat else _encode_message(llm, what)
        fitting = with_default_length(params, len(ids), llm.engine.plan.limits.max_context)
        stream = llm.stream(ids, fitting)
        write = write_stream if params.n == 1 else write_choices
        written = write(stream, sys.stdout, as_ids=llm.tokenizer is None)
    click.echo()
    if stats:
        click.echo(written.summary(begun + written.first_token_seconds), err=True)


def _encode_message(llm: "LLM", text: str | list[int]) -> list[int]:
    from ...ir.errors import RequestError

    if llm.tokenizer is None:
        raise RequestError("this model has no tokenizer", field="messages")
    return llm.tokenizer.encode_chat([{"role": "user", "content": text}])
