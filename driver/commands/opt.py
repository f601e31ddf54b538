"""`infc opt`: passes over a program in text form, as the golden tests run them."""

import click


@click.command("opt")
@click.argument("file", metavar="FILE.ir")
@click.option(
    "-p", "--passes", "pipeline", required=True, metavar="TEXT", help='Such as "a,b{k=v}".'
)
@click.option("-o", "--output", metavar="FILE", help="Where the result goes; stdout if not given.")
@click.option("--stats", is_flag=True, help="Print to stderr what each pass did.")
@click.option(
    "--verify", is_flag=True, help="Hold each pass to its contract, on random inputs and weights."
)
def command(file: str, pipeline: str, output: str | None, stats: bool, verify: bool) -> None:
    """Run passes over a program and print the result.

    FILE.ir is IR text; - reads it from stdin.

    \b
      infc opt captured.ir -p "squeeze-unit-batch,eliminate-dead-code"
      infc opt layer.ir -p "fuse-rms-norm,merge-qkv" -o fused.ir
      infc opt layer.ir -p my_module:MyPass --stats --verify
    """
    from pathlib import Path

    from ...ir.errors import UsageError
    from ..optimize import optimize_text
    from ..text_input import read_file

    text = read_file(file)
    name = "<stdin>" if file == "-" else file
    result, table = optimize_text(text, pipeline, source=name, verify=verify)
    if stats:
        click.echo(table, err=True, nl=False)
    if output is None:
        click.echo(result, nl=not result.endswith("\n"))
    else:
        try:
            Path(output).write_text(result)
        except OSError as error:
            raise UsageError(
                f"cannot be written: {error.strerror}",
                where=output,
                hint="name another file with -o",
            ) from None
