"""`infc chat`: a conversation in the terminal."""

from typing import Any

import click

from ..sampling_options import generation_options
from ..set_option import set_option


@click.command("chat")
@click.argument("model")
@set_option
@click.option("--system", metavar="TEXT", help="System message.")
@generation_options("the rest of the context")
def command(model: str, overrides: tuple[str, ...], system: str | None, **options: Any) -> None:
    """Chat with a model in the terminal.

    MODEL is an artifact, a recipe, the name of a bundled recipe, a checkpoint directory, a GGUF
    file or a hub id. A model that is not compiled yet is compiled first and stored in the cache.

    Each line is a message. /reset starts a new chat, /exit or Ctrl-D ends it, and Ctrl-C stops the
    answer or discards the line. When the context is full, the oldest turns are dropped.

    \b
      infc chat Qwen/Qwen2.5-0.5B-Instruct
      infc chat tiny.infc --system "You write Python." --temperature 0.7
    """
    from ...ir.errors import UsageError
    from ...runtime.api.llm import LLM
    from ..conversation import converse
    from ..open_model import open_model
    from ..sampling_options import engine_arguments, sampling_params

    opened = open_model(model, overrides, options.pop("verify"))
    arguments = engine_arguments(options)
    params = sampling_params(options, opened)
    with LLM(opened, **arguments) as llm:
        if llm.tokenizer is None or not llm.tokenizer.has_chat_template:
            raise UsageError(
                "this model has no chat template",
                where=model,
                hint="continue a text with `infc generate`",
            )
        converse(llm, params, system)
