"""`infc passes`: the pipeline in order, or all about one pass."""

import click


@click.command("passes")
@click.argument("name", required=False)
def command(name: str | None) -> None:
    """List the passes in pipeline order, or describe one.

    \b
      infc passes
      infc passes fuse-rms-norm
      infc passes my_module:MyPass
    """
    from ..describe_passes import describe_pass, list_pipeline

    click.echo(describe_pass(name) if name else list_pipeline())
