"""`infc run`: answers a prompt or starts a chat, whatever form the model is in."""

import sys
from typing import Any

import click

from ..sampling_options import generation_options
from ..set_option import set_option


@click.command("run")
@click.argument("model")
@click.argument("prompt", required=False)
@set_option
@click.option("-f", "--file", metavar="FILE", help="Read the prompt from a file.")
@click.option("--system", metavar="TEXT", help="System message of the chat.")
@click.option("--raw", is_flag=True, help="Continue the prompt as text, without the chat template.")
@click.option(
    "--stats/--no-stats", default=True, show_default=True, help="Report the speed on stderr."
)
@generation_options("the rest of the context for a chat, otherwise 256 tokens")
def command(
    model: str,
    prompt: str | None,
    overrides: tuple[str, ...],
    file: str | None,
    system: str | None,
    raw: bool,
    stats: bool,
    **options: Any,
) -> None:
    """Run a model: answer a prompt, or chat in the terminal.

    MODEL is an artifact, a recipe, the name of a bundled recipe, a checkpoint directory, a GGUF
    file or a hub id. A model that is not compiled yet is compiled first and stored in the cache.

    The prompt is an argument, a file, or piped input. Without a prompt, a chat starts in the
    terminal, as with `infc chat`. The prompt is sent as a message if the model has a chat
    template; otherwise, or with --raw, it is continued as text.

    \b
      infc run tiny "Write a class for a stack."
      infc run tiny --raw "def fibonacci(n):"
      infc run Qwen/Qwen2.5-0.5B-Instruct
      infc run qwen2.5-7b-instruct -f question.txt --set quantization=int4
    """
    from ...ir.errors import UsageError
    from ...runtime.api.llm import LLM
    from ..conversation import converse
    from ..generate import encode_message, write_answer
    from ..open_model import open_model
    from ..sampling_options import engine_arguments, sampling_params, with_default_length
    from ..text_input import read_prompt

    interactive = prompt is None and file is None and sys.stdin.isatty()
    text = "" if interactive else read_prompt(prompt, file)
    if not interactive and not text.strip():
        raise UsageError("the prompt is empty", hint="pass one, pipe one in, or use -f FILE")
    opened = open_model(model, overrides, options.pop("verify"))
    arguments = engine_arguments(options)
    params = sampling_params(options, opened)
    tokenizer = opened.manifest.tokenizer
    chats = not raw and tokenizer is not None and tokenizer.chat_template is not None
    if system is not None and not chats:
        reason = "--raw uses no chat template" if raw else "the model has no chat template"
        raise UsageError(f"{reason}, so --system cannot be used", where=model)
    if interactive and not chats:
        raise UsageError(
            "no prompt, and the model has no chat template" if not raw else "no prompt",
            where=model,
            hint="pass one, or use -f FILE",
        )
    with LLM(opened, **arguments) as llm:
        if interactive:
            click.echo("/reset starts a new chat, /exit or Ctrl-D ends it", err=True)
            converse(llm, params, system)
            return
        ids = encode_message(llm, text, system) if chats else llm.engine.encode(text)
        if not chats:
            params = with_default_length(params, len(ids), llm.engine.plan.limits.max_context)
        write_answer(llm, ids, params, stats=stats)
