"""`infc doctor`: what this machine has, and which parts of infc would work on it."""

import click


@click.command("doctor")
def command() -> None:
    """Show what this machine offers: instruction set, compiler, libraries, huge pages, backends.

    The status is 1 where no artifact could run here at all.

    \b
      infc doctor
    """
    from ..doctor import examine

    findings = examine()
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        mark = "ok     " if finding.fine else "missing"
        click.echo(f"{mark}  {finding.subject:<{width}}  {finding.detail}")
    if any(finding.needed and not finding.fine for finding in findings):
        raise click.exceptions.Exit(1)
