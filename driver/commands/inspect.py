"""`infc inspect`: what an artifact holds."""

import click


@click.command("inspect")
@click.argument("artifact")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest itself.")
@click.option(
    "--verify",
    type=click.Choice(["stamp", "full", "none"]),
    default="stamp",
    show_default=True,
    help="Which files are read whole first: changed ones, all, none.",
)
def command(artifact: str, as_json: bool, verify: str) -> None:
    """Show an artifact's model, target, memory, ops and passes.

    \b
      infc inspect tiny.infc
      infc inspect tiny.infc --verify full --json
    """
    from typing import cast

    from ...ir.artifact import Verification, open_artifact
    from ..inspect_artifact import describe_artifact

    opened = open_artifact(artifact, cast("Verification", verify))
    click.echo(opened.manifest.to_text() if as_json else describe_artifact(opened), nl=not as_json)
