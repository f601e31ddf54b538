"""`infc doctor`: what this machine has, and which parts of infc would work on it."""

import click


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Check this machine: instruction set, compiler, libraries, huge pages, backends.

    The exit status is 1 if no artifact could run on this machine.

    \b
      infc doctor
      infc doctor --json
    """
    from dataclasses import asdict

    from ...ir.manifest import canonical_json
    from ..doctor import examine

    findings = examine()
    lacking = [finding for finding in findings if finding.needed and not finding.fine]
    if as_json:
        data = {"usable": not lacking, "findings": [asdict(finding) for finding in findings]}
        click.echo(canonical_json(data), nl=False)
    else:
        width = max(len(finding.subject) for finding in findings)
        for finding in findings:
            mark = "ok" if finding.fine else finding.lacking
            click.echo(f"{mark:<9}  {finding.subject:<{width}}  {finding.detail}")
    if lacking:
        raise click.exceptions.Exit(1)
