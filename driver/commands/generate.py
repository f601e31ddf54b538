"""`infc generate`: continues a text."""

from typing import Any

import click

from ..sampling_options import generation_options, parse_token_ids
from ..set_option import set_option


@click.command("generate")
@click.argument("model")
@click.argument("prompt", required=False)
@set_option
@click.option("-f", "--file", metavar="FILE", help="Read the prompt from a file.")
@click.option(
    "--token-ids", callback=parse_token_ids, metavar="1,2,3", help="The prompt as token ids."
)
@click.option(
    "--chat/--raw",
    default=False,
    help="Send the prompt as a chat message, or continue it as it is (default).",
)
@click.option(
    "-n", "n", type=int, help="Number of answers; several are numbered and printed at the end."
)
@click.option(
    "--best-of", type=int, help="Generate this many answers and keep the most likely ones."
)
@click.option(
    "--stats/--no-stats", default=True, show_default=True, help="Report the speed on stderr."
)
@generation_options("256 tokens")
def command(
    model: str,
    prompt: str | None,
    overrides: tuple[str, ...],
    file: str | None,
    token_ids: tuple[int, ...] | None,
    chat: bool,
    stats: bool,
    **options: Any,
) -> None:
    """Continue a text.

    MODEL is an artifact, a recipe, the name of a bundled recipe, a checkpoint directory, a GGUF
    file or a hub id. A model that is not compiled yet is compiled first and stored in the cache.

    If the prompt is - or missing, it is read from stdin.

    \b
      infc generate tiny "def fibonacci(n):" --max-tokens 64
      echo "Once upon a time" | infc generate tiny.infc --temperature 0.8 --seed 7
      infc generate tiny.infc -f prompt.txt
      infc generate tiny.infc --chat "Write a class for a stack."
      infc generate tiny.infc --token-ids 1,15,27
      infc generate tiny.infc "import" -n 3 --temperature 0.8 --min-p 0.05
    """
    from ...runtime.api.llm import LLM
    from ..generate import encode_message, write_answer
    from ..open_model import open_model
    from ..sampling_options import (
        engine_arguments,
        print_note,
        sampling_params,
        with_default_length,
    )
    from ..text_input import read_prompt

    if token_ids is not None and (prompt is not None or file is not None or chat):
        raise click.UsageError("--token-ids cannot be combined with a prompt or --chat")
    text = read_prompt(prompt, file) if token_ids is None else ""
    opened = open_model(model, overrides, options.pop("verify"))
    arguments = engine_arguments(options)
    params = sampling_params(options, opened)
    if params.num_choices > 1 and params.temperature == 0:
        print_note("with temperature 0 all answers are the same")
    with LLM(opened, **arguments) as llm:
        ids = encode_message(llm, text) if chat else llm.engine.encode(token_ids or text)
        fitting = with_default_length(params, len(ids), llm.engine.plan.limits.max_context)
        write_answer(llm, ids, fitting, stats=stats)
