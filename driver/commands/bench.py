"""`infc bench`: tokens a second of an artifact on this machine."""

import click


@click.command("bench")
@click.argument("artifact", required=False)
@click.option("--machine", is_flag=True, help="Measure this machine's ceilings, and keep them.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--new-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Threads; as compiled by default.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    artifact: str | None,
    machine: bool,
    prompt_tokens: int,
    new_tokens: int,
    batch: int,
    rounds: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure prefill and decode speed with random prompts.

    \b
      infc bench --machine
      infc bench tiny.infc
      infc bench tiny.infc --batch 16 --prompt-tokens 512 --json
    """
    if artifact is None:
        if not machine:
            raise click.UsageError("name an artifact, or ask for --machine")
        _measure_machine(threads, as_json)
        return
    import json
    from dataclasses import asdict

    from ...ir.artifact import open_artifact
    from ...ir.sizes import format_count
    from ..benchmark import measure_speed
    from ..sampling_options import print_note

    speed = measure_speed(
        open_artifact(artifact),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch=batch,
        rounds=rounds,
        threads=threads,
        on_note=print_note,
    )
    if batch > speed.at_once:
        print_note(
            f"{speed.at_once} sequences run at once, so {batch - speed.at_once} wait for their turn"
        )
    if as_json:
        click.echo(json.dumps(asdict(speed)))
        return
    threads_used = format_count(speed.threads, "thread")
    click.echo(f"{batch} × ({prompt_tokens} + {new_tokens}) tokens, {threads_used}")
    click.echo(f"prefill      {speed.prefill_tokens_per_second:10.1f} tokens/s")
    click.echo(f"decode       {speed.decode_tokens_per_second:10.1f} tokens/s")
    click.echo(f"first token  {speed.first_token_seconds * 1e3:10.1f} ms")
    click.echo(f"host         {speed.host_step_microseconds:10.1f} µs a step")


def _measure_machine(threads: int | None, as_json: bool) -> None:
    import json
    from dataclasses import asdict

    from ..bench.ceilings import measure_machine
    from ..bench.machine_text import render_machine
    from ..explain.text import terminal
    from ..progress import make_reporter

    machine = measure_machine(make_reporter(quiet=as_json), None if threads is None else [threads])
    if as_json:
        click.echo(json.dumps(asdict(machine), indent=1))
    else:
        click.echo(render_machine(machine, **terminal()), nl=False)
