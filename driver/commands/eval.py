"""`infc eval`: how well a model predicts a text."""

import click


@click.command("eval")
@click.argument("artifact")
@click.argument("file")
@click.option("--context", type=int, metavar="TOKENS", help="Window; the compiled one by default.")
@click.option("--stride", type=int, metavar="TOKENS", help="From window to window; half a window.")
@click.option("--max-bytes", type=click.IntRange(min=1), help="Only the beginning of the file.")
@click.option("--against", metavar="ARTIFACT", help="Compare with another build of the model.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads; one a core by default.")
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
    from pathlib import Path

    from ...ir.artifact import open_artifact
    from ...ir.errors import UsageError
    from ..evaluate import compare_on_text, evaluate_text

    try:
        data = Path(file).read_bytes()[:max_bytes]
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}", where=file) from None
    text = data.decode("utf-8", errors="ignore" if max_bytes else "replace")
    sizes = {"context_tokens": context, "stride_tokens": stride, "num_threads": threads}
    opened = open_artifact(artifact)
    other = None if against is None else open_artifact(against)
    result = evaluate_text(opened, text, **sizes)
    distance = None if other is None else compare_on_text(opened, other, text, **sizes)
    if as_json:
        figures = {"perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte}
        more = {} if distance is None else {"against": asdict(distance)}
        click.echo(json.dumps({**figures, **asdict(result), **more}))
        return
    click.echo(f"perplexity     {result.perplexity:.4f}")
    click.echo(f"bits per byte  {result.bits_per_byte:.4f}")
    if distance is not None:
        click.echo(f"KL, mean       {distance.kl_mean:.6f} nats from {against}")
        click.echo(f"KL, 99 %, max  {distance.kl_p99:.6f}, {distance.kl_max:.6f}")
        click.echo(f"same top token {distance.same_top:.2%}")
    click.echo(f"over {result.num_tokens} tokens, {result.num_bytes} bytes")
