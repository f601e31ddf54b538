"""`infc batch`: answers a file of requests."""

from __future__ import annotations

from pathlib import Path

import click

from ..engine_options import engine_options
from ..set_option import set_option


@click.command("batch")
@click.argument("model")
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@set_option
@click.option(
    "--model-name",
    metavar="NAME",
    multiple=True,
    help="Name of the model in the requests; repeatable.  [default: its own]",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Seed of the batch, for requests without one: theirs follows from it and custom_id.",
)
@click.option(
    "--processes",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Engines in processes of their own, which share the weights and the threads; 0 for one"
    " in this process.",
)
@engine_options
@click.option(
    "--verify",
    type=click.Choice(["stamp", "full", "none"]),
    default="stamp",
    show_default=True,
    help="Which files to check first: changed ones, all, or none.",
)
def command(
    model: str,
    source: Path,
    output: Path,
    overrides: tuple[str, ...],
    model_name: tuple[str, ...],
    seed: int,
    processes: int,
    threads: int | None,
    weights: str | None,
    max_context: int | None,
    max_sequences: int | None,
    kv_memory: str | None,
    verify: str,
) -> None:
    """Answer the requests in a file, in the batch format of OpenAI.

    MODEL is an artifact, a recipe, the name of a bundled recipe, a checkpoint directory, a GGUF
    file or a hub id. A model that is not compiled yet is compiled first and stored in the cache.

    Each line of INPUT is a request for /v1/chat/completions or /v1/completions, and OUTPUT gets a
    line for each, in the same order. An error in a request ends that request alone. After Ctrl-C,
    a crash or kill -9, the same command goes on where OUTPUT ends, and OUTPUT becomes byte for
    byte what it would have been without.

    \b
      infc batch tiny.infc requests.jsonl answers.jsonl
      infc batch tiny.infc requests.jsonl answers.jsonl --processes 2 --seed 7
      infc batch tiny requests.jsonl answers.jsonl --model-name gpt-4o-mini

    \b
    A line of INPUT (broken here):
      {"custom_id": "1", "method": "POST", "url": "/v1/completions",
       "body": {"model": "tiny", "prompt": "def", "max_tokens": 32}}
    """
    from typing import cast

    from ...ir.artifact import Verification, open_artifact
    from ...runtime.batch.run import BatchOptions, run_batch
    from ...runtime.options import RuntimeOptions
    from ...runtime.server.opening import model_name_of
    from ..open_model import artifact_and_names
    from ..sampling_options import print_note

    path, names = artifact_and_names(model, overrides)
    checked = cast("Verification", verify)
    options = BatchOptions(
        source=source,
        output=output,
        model_names=model_name or names or (model_name_of(path),),
        seed=seed,
        processes=processes,
        runtime=RuntimeOptions(
            threads=threads,
            weights=weights,
            max_context=max_context,
            max_sequences=max_sequences,
            kv_memory=kv_memory,
        ),
        verify=checked,
    )
    result = run_batch(open_artifact(path, checked, weights="later"), options, note=print_note)
    if result.stopped_by is not None:
        rows = f"{result.num_rows} rows are in {output}"
        click.echo(f"stopped: {rows}; the same command goes on with the others", err=True)
        raise click.exceptions.Exit(128 + result.stopped_by)
    failed = f", {result.num_failed} of them without an answer" if result.num_failed else ""
    before = f" ({result.num_before} were there before)" if result.num_before else ""
    click.echo(f"{output}: {result.num_rows} rows{failed}{before}", err=True)
