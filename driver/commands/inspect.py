"""`infc inspect`: what an artifact holds, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from ..threads_option import threads_option

if TYPE_CHECKING:
    from ...ir.manifest import Manifest


@click.command("inspect")
@click.argument("artifact")
@click.option("--batch", type=int, metavar="N", help="Sequences in the decode step.  [default: 1]")
@click.option("--context", type=int, metavar="N", help="Tokens in the KV cache.  [default: all]")
@click.option("--tokens", type=int, metavar="N", help="Tokens in the prefill step.  [default: all]")
@click.option("--memory", metavar="SIZE", help="Memory, such as 8GiB.  [default: free memory]")
@click.option("--layer", type=int, metavar="N", help="Show only this layer, node by node.")
@click.option("--op", metavar="NAME", help="Show only the nodes of this op.")
@click.option(
    "--program",
    "stage",
    metavar="[STAGE]",
    is_flag=False,
    flag_value="final",
    help="Print IR text: final, captured, or of another program PROGRAM[:captured].",
)
@click.option(
    "--compare",
    metavar="OTHER",
    help="Run the same steps on OTHER and on ARTIFACT: error of logits, speed, memory.",
)
@click.option("--graph", metavar="FILE", help="Write an HTML page (.html) or a drawing (.svg).")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option(
    "--resources", is_flag=True, help="Print what a container that serves it needs, as YAML."
)
@click.option(
    "--replicas", type=click.IntRange(min=0), help="Engines, for --resources.  [default: 0]"
)
@threads_option("for --resources, by default as compiled, else one for each engine")
@click.option("--kv-memory", metavar="SIZE", help="KV cache of an engine, for --resources.")
@click.option(
    "--verify",
    type=click.Choice(["stamp", "full", "none"]),
    default="stamp",
    show_default=True,
    help="Which files to check first: changed ones, all, or none.",
)
def command(
    artifact: str,
    batch: int | None,
    context: int | None,
    tokens: int | None,
    memory: str | None,
    layer: int | None,
    op: str | None,
    stage: str | None,
    compare: str | None,
    graph: str | None,
    as_json: bool,
    resources: bool,
    replicas: int | None,
    threads: int | None,
    kv_memory: str | None,
    verify: str,
) -> None:
    """Show an artifact's model, memory, ops, their bytes and operations, and passes.

    With --compare A B, both artifacts compute what one engine schedules: --batch prompts of at
    most --tokens tokens. Errors are those of B against A.

    \b
      infc inspect tiny.infc
      infc inspect tiny.infc --batch 8 --context 512 --memory 8GiB
      infc inspect tiny.infc --layer 2
      infc inspect tiny.infc --op linear --json
      infc inspect tiny.infc --program captured
      infc inspect tiny.infc --graph tiny.html
      infc inspect tiny.infc --resources --replicas 2
      infc inspect --compare tiny.infc tiny-onnx.infc --graph parity.svg
    """
    from typing import cast

    from ...ir.artifact import Verification, open_artifact
    from ...runtime.limits import parse_bytes
    from ..bench.ceilings import known_ceilings
    from ..explain.collect import inspect_artifact, program_text

    given = {"--replicas": replicas, "--threads": threads, "--kv-memory": kv_memory}
    for name, value in given.items():
        if value is not None and not resources:
            raise click.UsageError(f"{name} needs --resources")
    if compare is not None:
        others = {"context": context, "memory": memory, "layer": layer, "op": op, "program": stage}
        others["resources"] = resources or None
        _refuse(name for name, value in others.items() if value is not None)
        _compare((compare, artifact), verify, (batch, tokens), graph, as_json)
        return
    opened = open_artifact(artifact, cast("Verification", verify))
    if resources:
        _print_resources(opened.manifest, as_json, given, batch=batch, context=context)
        return
    if stage is not None:
        click.echo(program_text(opened, stage), nl=False)
        return
    facts = inspect_artifact(
        opened,
        batch=batch,
        context=context,
        tokens=tokens,
        memory=None if memory is None else parse_bytes(memory),
        ceilings=known_ceilings(opened.manifest),
    )
    if graph is not None:
        from ..explain.graph import write_graph

        click.echo(str(write_graph(facts, graph)))
    elif as_json:
        from ..explain.document import artifact_json, nodes_json

        narrowed = layer is not None or op is not None
        click.echo(nodes_json(facts, layer, op) if narrowed else artifact_json(facts))
    else:
        _print(facts, layer, op)


def _print_resources(
    manifest: Manifest,
    as_json: bool,
    given: Mapping[str, Any],
    *,
    batch: int | None,
    context: int | None,
) -> None:
    """What a container needs, with the options that only this has."""
    from ...runtime.limits import parse_bytes
    from ..explain.container import container_text, size_container

    kv_memory = given["--kv-memory"]
    sizes = size_container(
        manifest,
        replicas=given["--replicas"] or 0,
        threads=given["--threads"],
        kv_memory=None if kv_memory is None else parse_bytes(kv_memory),
        batch=batch,
        context=context,
    )
    click.echo(container_text(sizes, as_json=as_json), nl=False)


def _refuse(names: Iterator[str]) -> None:
    from ...ir.errors import UsageError

    for name in names:
        raise UsageError(
            f"--{name} says nothing about a comparison",
            hint="--compare takes --batch, --tokens, --graph, --json and --verify",
        )


def _compare(
    pair: tuple[str, str],
    verify: str,
    sizes: tuple[int | None, int | None],
    picture: str | None,
    as_json: bool,
) -> None:
    from typing import cast

    from ...ir.artifact import Verification
    from ..explain.text import terminal
    from ..parity.document import parity_json
    from ..parity.picture import picture_path, write_picture
    from ..parity.run import ParityOptions, compare_artifacts
    from ..parity.text import render_parity

    if picture is not None:
        picture_path(picture)  # before anything runs
    options = ParityOptions(sequences=sizes[0], prompt_tokens=sizes[1])
    parity = compare_artifacts(*pair, options, verify=cast("Verification", verify))
    click.echo(parity_json(parity) if as_json else render_parity(parity, **terminal()), nl=as_json)
    if picture is not None:
        click.echo(f"{write_picture(parity, picture)}", err=as_json)


def _print(facts: object, layer: int | None, op: str | None) -> None:
    from ..explain.facts import ArtifactFacts
    from ..explain.narrow import render_nodes
    from ..explain.programs_text import render_programs
    from ..explain.text import terminal

    assert isinstance(facts, ArtifactFacts)
    if layer is None and op is None:
        text = render_programs(facts, **terminal())
    else:
        text = render_nodes(facts, layer, op, **terminal())
    click.echo(text, nl=False)
