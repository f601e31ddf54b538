"""`infc rebuild`: an artifact for another processor, from the source inside it."""

import click


@click.command("rebuild")
@click.argument("artifact")
@click.option(
    "--target",
    default="native",
    show_default=True,
    help="Such as x86-64-v3, x86-64-v4+vnni, zen4; native is this machine.",
)
@click.option("-o", "--output", metavar="DIR", help="The new artifact; NAME-TARGET.infc if absent.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
def command(artifact: str, target: str, output: str | None, quiet: bool) -> None:
    """Build an artifact again for another processor.

    It takes a C++ compiler, and neither the model nor torch: source and weights are in the
    artifact. The result is what compiling the model for that target gives. Without -o, an
    artifact of another checkpoint is not replaced.

    \b
      infc rebuild tiny.infc
      infc rebuild tiny.infc --target x86-64-v3 -o tiny-v3.infc
    """
    from ..progress import make_reporter
    from ..rebuild import rebuild_artifact

    made = rebuild_artifact(artifact, target, output, progress=make_reporter(quiet))
    if not quiet:
        click.echo(made.path)
