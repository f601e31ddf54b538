"""`infc diff`: how two programs, artifacts or compilations differ."""

import click


@click.command("diff")
@click.argument("before")
@click.argument("after")
@click.option("--stat", is_flag=True, help="Print only the statistics, without lines of IR.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(before: str, after: str, stat: bool, as_json: bool) -> None:
    """Show how two programs or artifacts differ, pass by pass.

    BEFORE and AFTER are artifacts, ARTIFACT:STAGE (captured or final), ARTIFACT:PROGRAM:STAGE,
    files of IR text, or directories that --dump-ir-after wrote. Names of values are ignored, and
    equal layers are shown once. Exit status: 0 if they are equal, 1 if not.

    \b
      infc diff float.infc int8.infc
      infc diff tiny.infc:captured tiny.infc:final --stat
      infc diff old.dumps new.dumps
    """
    from ..explain.compare import diff_paths
    from ..explain.compare_text import render_diff
    from ..explain.text import terminal

    found = diff_paths(before, after)
    if as_json:
        from ..explain.document import diff_json

        click.echo(diff_json(found))
    else:
        click.echo(render_diff(found, stat=stat, **terminal()), nl=False)
    if not found.equal:
        raise click.exceptions.Exit(1)
