"""`infc compile`: a recipe, a checkpoint, a GGUF file or a hub id in, an artifact out."""

import click


@click.command("compile")
@click.argument("recipe")
@click.option("-o", "--output", metavar="DIR", help="Output directory.  [default: MODEL.infc]")
@click.option(
    "--force", is_flag=True, help="Replace MODEL.infc even if it was made from another checkpoint."
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the recipe; repeatable.",
)
@click.option(
    "--verify/--no-verify",
    default=True,
    show_default=True,
    help="Compare the outputs of the model before and after each pass.",
)
@click.option(
    "--cache/--no-cache", default=True, show_default=True, help="Reuse an artifact from the cache."
)
@click.option(
    "--dump-ir-after", metavar="PASS|all", help="Write the program after a pass to a file."
)
@click.option(
    "--dump-dir", metavar="DIR", help="Directory for these files.  [default: OUTPUT.dumps]"
)
@click.option("-q", "--quiet", is_flag=True, help="Print only errors.")
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

    RECIPE is a recipe file, the name of a bundled recipe (see `infc recipe list`), or a checkpoint
    directory, GGUF file or hub id, which are compiled with default settings.

    \b
      infc compile tiny -o tiny.infc
      infc compile Qwen/Qwen2.5-0.5B-Instruct --set quantization=int8
      infc compile path/to/checkpoint
      infc compile path/to/model.Q8_0.gguf --set dtype=bfloat16
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
