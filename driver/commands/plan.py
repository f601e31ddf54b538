"""`infc plan`: what several engines of an artifact would do with a load, without any of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import click

from ...runtime.replicas.policy_names import PolicyName
from ..threads_option import threads_option


def _counts(context: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    """Numbers of replicas."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = ()
    if not counts or min(counts) < 1:
        raise click.BadParameter(f"{text!r} are no numbers such as 1,2,4")
    return counts


class _FiniteRange(click.FloatRange):
    """A number that can be computed with: "inf" and "nan" are read as numbers, too."""

    def convert(
        self, value: Any, param: click.Parameter | None, context: click.Context | None
    ) -> Any:
        number = super().convert(value, param, context)
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, context)
        return number


def _range(context: click.Context, option: click.Parameter, text: str | None) -> Any:
    """The least and the greatest number of replicas."""
    if text is None:
        return None
    least, _, most = text.partition(":")
    if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        raise click.BadParameter(f"{text!r} is no range such as 1:8")
    return int(least), int(most)


@click.command("plan")
@click.argument("artifact")
@click.option(
    "--replicas", "counts", default="1,2,4", show_default=True, callback=_counts, metavar="N,...",
    help="Numbers of replicas to compare.",
)  # fmt: skip
@click.option(
    "--rate", type=_FiniteRange(min=0, min_open=True), default=4.0, show_default=True,
    help="Requests per second, at random times.",
)  # fmt: skip
@click.option("--requests", type=click.IntRange(min=1), default=2000, show_default=True)
@click.option("--prompt-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--output-tokens", type=click.IntRange(min=1), default=64, show_default=True)
@click.option(
    "--prefixes", type=click.IntRange(min=0), default=0, show_default=True,
    help="Prefixes that prompts begin with, one of them each.",
)  # fmt: skip
@click.option("--prefix-tokens", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--trace", type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Requests of a file instead, in the format of Mooncake's traces (JSON lines).",
)  # fmt: skip
@click.option("--trace-block", type=click.IntRange(min=1), default=512, show_default=True,
              help="Tokens of a block of the trace.")  # fmt: skip
@click.option(
    "--routing", type=click.Choice(get_args(PolicyName)), default="prefix", show_default=True,
    help="Which replica gets a request.",
)  # fmt: skip
@click.option(
    "--fronts", type=click.IntRange(min=1), default=1, show_default=True,
    help="Servers among which replicas are divided, and requests at random.",
)  # fmt: skip
@click.option(
    "--fronts-by-prefix",
    is_flag=True,
    help="Choose the server by the first block of a prompt instead.",
)
@click.option("--autoscale", callback=_range, metavar="LEAST:MOST",
              help="Let the number of replicas follow the load.")  # fmt: skip
@click.option(
    "--target-requests", type=_FiniteRange(min=0, min_open=True), default=16.0,
    show_default=True, help="Requests per replica, for --autoscale.",
)  # fmt: skip
@click.option("--start-seconds", type=_FiniteRange(min=0), default=30.0, show_default=True,
              help="Until a new replica is ready, for --autoscale.")  # fmt: skip
@click.option("--failure-seconds", type=_FiniteRange(min=0, min_open=True),
              help="Mean time of a replica to its next death.  [default: none dies]")  # fmt: skip
@click.option("--restart-seconds", type=_FiniteRange(min=0), default=0.3, show_default=True,
              help="Until a dead one is back.")  # fmt: skip
@click.option("--measure", is_flag=True,
              help="Measure steps on this machine instead of predicting them.")  # fmt: skip
@click.option("--slowdown", type=_FiniteRange(min=0, min_open=True), default=1.0,
              show_default=True, help="Times as long as steps take.")  # fmt: skip
@threads_option("of a replica, for --measure; by default as compiled")
@click.option("--kv-memory", metavar="SIZE", help="KV cache of a replica, such as 1GiB.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(artifact: str, **given: Any) -> None:
    """Simulate how replicas of an artifact serve a load.

    Steps take what the roofline of this machine allows, or what --measure finds; routing is that
    of `infc serve`. Nothing is served.

    \b
      infc plan tiny.infc --replicas 1,2,4,8 --rate 40 --measure
      infc plan tiny.infc --rate 40 --prompt-tokens 600 --prefixes 16 --prefix-tokens 512
      infc plan tiny.infc --trace conversation_trace.jsonl --replicas 16
      infc plan tiny.infc --replicas 2 --autoscale 2:8 --failure-seconds 600
    """
    from ...ir.artifact import open_artifact
    from ...runtime.options import RuntimeOptions
    from ..simulate.costs import FrontCosts
    from ..simulate.fleet import simulate
    from ..simulate.planned import plan_replica, saturation, with_blocks_of
    from ..simulate.text import as_json, render

    options = RuntimeOptions(threads=given["threads"], kv_memory=given["kv_memory"])
    planned = plan_replica(open_artifact(artifact, "stamp"), options, measure=given["measure"])
    workload = _workload(given, planned.limits.block_size)
    _note_on_long(workload, planned.max_context)
    limits = with_blocks_of(planned.limits, workload.block_size)
    costs = planned.costs.slower(given["slowdown"])
    outcomes = [
        simulate(_fleet(given, count, limits, costs), workload) for count in given["counts"]
    ]
    point = saturation(limits, costs, FrontCosts(), workload)
    if given["as_json"]:
        click.echo(as_json(outcomes, point))
        return
    click.echo(render(outcomes, point, source=planned.source, rate=workload.rate), nl=False)


def _workload(given: dict[str, Any], block_size: int) -> Any:
    from ..simulate.workload import Mix, random_workload, read_trace

    if given["trace"] is not None:
        return read_trace(given["trace"], block_size=given["trace_block"])
    mix = Mix(
        prompt_tokens=given["prompt_tokens"],
        output_tokens=given["output_tokens"],
        num_prefixes=given["prefixes"],
        prefix_tokens=given["prefix_tokens"],
    )
    return random_workload(
        given["rate"], given["requests"], mix, block_size=block_size, seed=given["seed"]
    )


def _note_on_long(workload: Any, max_context: int) -> None:
    """A simulation knows no context, and engines do."""
    from ..sampling_options import print_note

    lengths = [each.prompt_tokens + each.output_tokens for each in workload.asked]
    if count := sum(length > max_context for length in lengths):
        print_note(
            f"{count} of {len(lengths)} requests are longer than the context of {max_context}"
            " tokens: an engine refuses them or ends their answers there"
        )


def _fleet(given: dict[str, Any], count: int, limits: Any, costs: Any) -> Any:
    from ..simulate.fleet import Autoscaling, Fleet

    scaling = None
    if given["autoscale"] is not None:
        least, most = given["autoscale"]
        scaling = Autoscaling(
            least=least,
            most=most,
            target=given["target_requests"],
            start_seconds=given["start_seconds"],
        )
    return Fleet(
        replicas=count,
        limits=limits,
        costs=costs,
        fronts=given["fronts"],
        fronts_by_prefix=given["fronts_by_prefix"],
        routing=given["routing"],
        autoscaling=scaling,
        failure_seconds=given["failure_seconds"] or math.inf,
        restart_seconds=given["restart_seconds"],
        seed=given["seed"],
    )
