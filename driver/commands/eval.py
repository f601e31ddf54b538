"""`infc eval`: how well a model predicts a text."""

import codecs
import sys
from typing import Any

import click

from ..threads_option import threads_option


@click.command("eval")
@click.argument("artifact")
@click.argument("file")
@click.option("--context", type=int, metavar="TOKENS", help="Window; the compiled one by default.")
@click.option("--stride", type=int, metavar="TOKENS", help="From window to window; half a window.")
@click.option("--max-bytes", type=click.IntRange(min=1), help="Only the beginning of the file.")
@click.option("--against", metavar="ARTIFACT", help="Compare with another build of the model.")
@threads_option("as compiled by default")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    artifact: str,
    file: str,
    context: int | None,
    stride: int | None,
    max_bytes: int | None,
    against: str | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure perplexity and bits per byte over a text file.

    \b
      infc eval tiny.infc recipes/tiny/heldout.py.txt
      infc eval tiny.infc book.txt --context 512 --stride 256 --json
      infc eval tiny-int8.infc book.txt --against tiny.infc
    """
    import json
    from dataclasses import asdict

    from ...ir.artifact import open_artifact
    from ..evaluate import compare_on_text, evaluate_text, window_sizes
    from ..progress import make_reporter

    text = read_text(file, max_bytes)
    opened = open_artifact(artifact)
    other = None if against is None else open_artifact(against)
    progress = make_reporter(quiet=not sys.stderr.isatty())
    both = [opened] if other is None else [opened, other]
    window, step = window_sizes(both, context, stride)
    sizes: dict[str, Any] = {
        "context_tokens": window,
        "stride_tokens": step,
        "num_threads": threads,
        "on_tokens": progress.advance,
    }
    with progress.stage(f"evaluate {artifact}"):
        result = evaluate_text(opened, text, **sizes)
    if other is not None:
        with progress.stage(f"evaluate {against}"):
            theirs = evaluate_text(other, text, **sizes)
        with progress.stage("compare them"):
            distance = compare_on_text(opened, other, text, **sizes)
    if as_json:
        figures = {"perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
        more = {}
        if other is not None:
            more = {"against": {"perplexity": theirs.perplexity, **asdict(distance)}}
        click.echo(json.dumps({**figures, **asdict(result), **more}))
        return
    click.echo(f"perplexity     {result.perplexity:.4f}")
    click.echo(f"bits per byte  {result.bits_per_byte:.4f}")
    if other is not None:
        change = result.perplexity / theirs.perplexity - 1
        click.echo(f"against        {theirs.perplexity:.4f} of {against}: {change:+.2%}")
        click.echo(f"KL, mean       {distance.kl_mean:.6f} nats")
        click.echo(f"KL, 99 %, max  {distance.kl_p99:.6f}, {distance.kl_max:.6f}")
        click.echo(f"same top token {distance.same_top:.1%}")
    windows = f"windows of {result.context_tokens} tokens, {result.stride_tokens} apart"
    click.echo(f"over {result.num_tokens} tokens, {result.num_bytes} bytes, in {windows}")


def read_text(file: str, max_bytes: int | None) -> str:
    """The file as text; a character that `max_bytes` cuts is left out.

    UsageError for a file that cannot be read, or is not UTF-8: a model's weights would take
    minutes, and mean nothing.
    """
    from ...ir.errors import UsageError

    try:
        with open(file, "rb") as opened:
            # One byte more tells whether the file ends there.
            data = opened.read(-1 if max_bytes is None else max_bytes + 1)
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=file) from None
    part = data[:max_bytes]
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(part, final=len(part) == len(data))
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 text (byte {error.start})", where=file) from None
