"""`infc eval`: how well a model predicts a text."""

import sys
from typing import Any

import click

from ..set_option import set_option
from ..threads_option import threads_option


@click.command("eval")
@click.argument("model")
@click.argument("file")
@set_option
@click.option(
    "--context",
    type=int,
    metavar="TOKENS",
    help="Window size; by default the compiled context, against a checkpoint at most 1024.",
)
@click.option(
    "--stride",
    type=int,
    metavar="TOKENS",
    help="Distance between windows; by default half a window.",
)
@click.option(
    "--max-bytes", type=click.IntRange(min=1), help="Read only this many bytes of the file."
)
@click.option(
    "--against",
    metavar="MODEL",
    help="Compare with another artifact, or with a checkpoint in float32 (a recipe, directory or"
    " hub id; source: what MODEL was compiled from).",
)
@threads_option("by default as compiled")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str,
    file: str,
    overrides: tuple[str, ...],
    context: int | None,
    stride: int | None,
    max_bytes: int | None,
    against: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure the perplexity and bits per byte of a text file.

    MODEL is an artifact, a recipe, the name of a bundled recipe, a checkpoint directory, a GGUF
    file or a hub id. A model that is not compiled yet is compiled first and stored in the cache.
    What it is compared with is compiled in no case.

    \b
      infc eval tiny.infc recipes/tiny/heldout.py.txt
      infc eval tiny book.txt --set quantization=int8 --against source
      infc eval tiny-int4.infc book.txt --against tiny-int8.infc
      infc eval tiny.infc book.txt --context 512 --stride 256 --json
    """
    import json
    from dataclasses import asdict

    from ..bare_executor import usual_threads
    from ..evaluate import compare_on_text, evaluate_text
    from ..open_model import open_model
    from ..progress import make_reporter
    from ..source_model import open_other, torch_threads
    from ..text_input import read_file

    text = read_file(file, max_bytes)
    opened = open_model(model, overrides)
    progress = make_reporter(quiet=not sys.stderr.isatty())
    sizes: dict[str, Any] = {
        "context_tokens": context,
        "stride_tokens": stride,
        "num_threads": threads,
        "on_tokens": progress.advance,
    }
    if against is None:
        with progress.stage(f"evaluate {model}"):
            result = evaluate_text(opened, text, **sizes)
        other = None
    else:
        with torch_threads(threads or usual_threads(opened.manifest)):
            compared = open_other(opened, against, progress)
            with progress.stage(f"compare with {against}"):
                other = compare_on_text(opened, compared, text, **sizes)
        result = other.mine
    if as_json:
        figures = {"perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
        more = {}
        if other is not None:
            figures_of_other = {"perplexity": other.theirs.perplexity, **asdict(other.divergence)}
            more = {"against": figures_of_other}
        click.echo(json.dumps({**figures, **asdict(result), **more}))
        return
    click.echo(f"perplexity     {result.perplexity:.4f}")
    click.echo(f"bits per byte  {result.bits_per_byte:.4f}")
    if other is not None:
        distance = other.divergence
        change = result.perplexity / other.theirs.perplexity - 1
        click.echo(f"against        {other.theirs.perplexity:.4f} of {against}: {change:+.2%}")
        click.echo(f"KL, mean       {distance.kl_mean:.6f} nats")
        click.echo(f"KL, 99 %, max  {distance.kl_p99:.6f}, {distance.kl_max:.6f}")
        click.echo(f"same top token {distance.same_top:.1%}")
    windows = f"windows of {result.context_tokens} tokens, {result.stride_tokens} apart"
    click.echo(f"over {result.num_tokens} tokens, {result.num_bytes} bytes, in {windows}")
