"""`infc rebuild`: an artifact for another processor or GPU, from what is inside it."""

import click


@click.command("rebuild")
@click.argument("artifact")
@click.option(
    "--target",
    default="native",
    show_default=True,
    help="Such as x86-64-v3, x86-64-v4+vnni, zen4, sm_80; native is this machine.",
)
@click.option(
    "-o", "--output", metavar="DIR", help="Output directory.  [default: NAME-TARGET.infc]"
)
@click.option("-q", "--quiet", is_flag=True, help="Print only errors.")
def command(artifact: str, target: str, output: str | None, quiet: bool) -> None:
    """Rebuild an artifact for another processor, or one for a GPU for another GPU.

    This needs a C++ compiler, or Triton or TensorRT for GPUs, but neither the original model nor
    torch, since the artifact contains the program and the weights. The result is the same as
    compiling the model for this target. Without -o, an artifact of another checkpoint is never
    replaced.

    \b
      infc rebuild tiny.infc
      infc rebuild tiny.infc --target x86-64-v3 -o tiny-v3.infc
      infc rebuild tiny-h100.infc --target sm_80
    """
    from ..progress import make_reporter
    from ..rebuild import rebuild_artifact

    made = rebuild_artifact(artifact, target, output, progress=make_reporter(quiet))
    if not quiet:
        click.echo(made.path)
