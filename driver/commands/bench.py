"""`infc bench`: what this machine gives, and what a model makes of it."""

from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from ..set_option import set_option
from ..threads_option import threads_option

if TYPE_CHECKING:
    from ..bench.workloads import Workload
    from ..progress import Reporter


@click.command("bench")
@click.argument("model", required=False)
@set_option
@click.option(
    "--workload",
    "names",
    multiple=True,
    metavar="NAME",
    help="decode, prefill, batch-32, batch-8, shared-prefix or start; may be repeated."
    "  [default: all]",
)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Custom workload: tokens per prompt.  [default: 128]",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Custom workload: tokens per answer.  [default: 64]",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    metavar="N",
    help="Custom workload: concurrent requests.  [default: 1]",
)
@click.option("--ops", is_flag=True, help="Measure each line of a decode step and a prefill step.")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Number of measured rounds.",
)
@threads_option("by default as compiled")
@click.option("--machine", is_flag=True, help="Measure the limits of this machine, and store them.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    model: str | None,
    overrides: tuple[str, ...],
    names: tuple[str, ...],
    prompt_tokens: int | None,
    new_tokens: int | None,
    batch: int | None,
    ops: bool,
    rounds: int,
    threads: int | None,
    machine: bool,
    as_json: bool,
) -> None:
    """Measure the speed of a model, and compare it with the limits of this machine.

    MODEL is an artifact, a recipe, the name of a bundled recipe, a checkpoint directory, a GGUF
    file or a hub id. A model that is not compiled yet is compiled first and stored in the cache.

    \b
      infc bench tiny.infc
      infc bench tiny.infc --workload decode --workload start --rounds 5
      infc bench tiny.infc --batch 16 --prompt-tokens 512 --json
      infc bench tiny.infc --ops
      infc bench --machine
    """
    if model is None:
        if not machine:
            raise click.UsageError("no model (name one, or use --machine)")
        _refuse_without_model()
        _measure_machine(threads, as_json)
        return
    import json
    from dataclasses import asdict

    from ..bench.run import INTERRUPTED, BenchOptions, run_bench
    from ..bench.text import render_bench
    from ..bench.workloads import START
    from ..explain.text import terminal
    from ..open_model import open_model
    from ..sampling_options import print_note

    opened = open_model(model, overrides)
    own = _own_workload(opened.manifest.main.limits.max_context, prompt_tokens, new_tokens, batch)
    options = BenchOptions(
        workloads=_workloads(names, own, ops),
        start=START in names or not (names or own or ops),
        steps=ops,
        rounds=rounds,
        threads=threads,
        measure_ceilings=machine,
    )
    result = run_bench(opened, options, _reporter(), print_note)
    for one in options.workloads:
        wait = min(one.requests, one.concurrency) - result.at_once
        if wait > 0:
            print_note(f"{result.at_once} sequences run at once, so {wait} must wait")
    if as_json:
        click.echo(json.dumps(asdict(result), indent=1))
    else:
        click.echo(render_bench(result, **terminal()), nl=False)
    if any(one.skipped == INTERRUPTED for one in result.workloads):
        raise KeyboardInterrupt
    if any(one.failed for one in result.workloads):
        raise click.exceptions.Exit(1)


def _refuse_without_model() -> None:
    """UsageError for a given option that only says how a model is measured."""
    context = click.get_current_context()
    for option in context.command.params:
        name = option.name or ""
        given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        if given and name not in ("machine", "threads", "as_json"):
            raise click.UsageError(f"{option.opts[0]} needs a model, which --machine does not use")


def _workloads(names: tuple[str, ...], own: "Workload | None", ops: bool) -> "tuple[Workload, ...]":
    """Those that are named and the user's own; all, where nothing else is asked for."""
    from ..bench.workloads import START, WORKLOADS, find_workload

    chosen = [find_workload(name) for name in dict.fromkeys(names) if name != START]
    if own is not None:
        chosen.append(own)
    return tuple(chosen) if names or own or ops else WORKLOADS


def _own_workload(
    max_context: int, prompt_tokens: int | None, new_tokens: int | None, batch: int | None
) -> "Workload | None":
    from ...ir.errors import UsageError
    from ..bench.workloads import Workload

    if prompt_tokens is None and new_tokens is None and batch is None:
        return None
    own = Workload(
        name="own",
        requests=batch or 1,
        prompt_tokens=prompt_tokens or 128,
        new_tokens=new_tokens or 64,
        concurrency=batch or 1,
    )
    if own.context > max_context:
        raise UsageError(
            f"{own.prompt_tokens} prompt tokens and {own.new_tokens} new tokens exceed the"
            f" context of {max_context}",
            hint="use fewer tokens, or compile with a larger runtime.max_context",
        )
    return own


def _reporter() -> "Reporter":
    """A bar on a terminal; what is measured is printed in any case, and times of stages are not."""
    import sys

    from ..progress import make_reporter

    return make_reporter(quiet=not sys.stderr.isatty())


def _measure_machine(threads: int | None, as_json: bool) -> None:
    import json
    from dataclasses import asdict

    from ..bench.ceilings import measure_machine
    from ..bench.machine_text import render_machine
    from ..explain.text import terminal
    from ..sampling_options import print_note

    counts = None if threads is None else [threads]
    machine = measure_machine(_reporter(), counts, print_note)
    if as_json:
        click.echo(json.dumps(asdict(machine), indent=1))
    else:
        click.echo(render_machine(machine, **terminal()), nl=False)
