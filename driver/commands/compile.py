"""`infc compile`: a recipe or a checkpoint directory in, an artifact out."""

import click


@click.command("compile")
@click.argument("recipe")
@click.option("-o", "--output", metavar="DIR", help="The artifact; MODEL.infc if not given.")
@click.option(
    "--force", is_flag=True, help="Replace MODEL.infc also where another checkpoint gave it."
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key; repeatable."
)
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Run the program before and after each pass, and compare.",
)
@click.option("--cache/--no-cache", default=True, show_default=True, help="Reuse equal artifacts.")
@click.option("--dump-ir-after", metavar="PASS|all", help="Write the program after a pass.")
@click.option("--dump-dir", metavar="DIR", help="Where dumps go; OUTPUT.dumps if not given.")
@click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors.")
def command(
    recipe: str,
    output: str | None,
    force: bool,
    overrides: tuple[str, ...],
    verify: bool,
    cache: bool,
    dump_ir_after: str | None,
    dump_dir: str | None,
    quiet: bool,
) -> None:
    """Compile a model into an artifact.

    RECIPE is a model.yaml, or a checkpoint directory for the default recipe.

    \b
      infc compile recipes/tiny/model.yaml -o tiny.infc
      infc compile model.yaml --set dtype=float32 --set runtime.max_context=2048
      infc compile model.yaml --no-cache --dump-ir-after all
    """
    from ..compile import compile_model
    from ..progress import make_reporter

    artifact = compile_model(
        recipe,
        output,
        overrides=overrides,
        force=force,
        verify=verify,
        cache=cache,
        dump_ir_after=dump_ir_after,
        dump_dir=dump_dir,
        progress=make_reporter(quiet),
    )
    if not quiet:
        click.echo(artifact.path)
