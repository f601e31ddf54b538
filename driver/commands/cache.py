"""`infc cache`: where compiled artifacts are kept, how much they take, and how to drop them."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..cache import CacheUse


@click.group("cache")
def command() -> None:
    """Show, limit or clear the cache of compiled artifacts.

    \b
      infc cache list
      infc cache limit 5GB
      infc cache clear
      INFC_CACHE_LIMIT=5GB infc compile model.yaml
    """


@command.command()
def path() -> None:
    """Print the directory of the cache."""
    from ...ir.user_cache import cache_directory

    click.echo(cache_directory())


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_entries(as_json: bool) -> None:
    """List the artifacts in the cache, most recently used first.

    \b
      infc cache list --json
    """
    from dataclasses import asdict
    from datetime import datetime

    from ...ir.manifest import canonical_json
    from ..cache import ArtifactCache

    entries = ArtifactCache().entries()
    if as_json:
        click.echo(canonical_json([asdict(entry) for entry in entries]), nl=False)
        return
    for entry in entries:
        used = datetime.fromtimestamp(entry.last_use).strftime("%Y-%m-%d %H:%M")
        size = _size(entry.size_bytes)
        what = f"{entry.model}  {entry.backend} {entry.target}  {entry.options}".rstrip()
        click.echo(f"{entry.key[:12]}  {used}  {size:>12}  {what}")


@command.command()
def size() -> None:
    """Print the size of the cache and its limit."""
    from ..cache import ArtifactCache

    use = ArtifactCache().use()
    click.echo(f"{_amount(use)} of at most {_size(use.limit_bytes)}")


@command.command()
@click.argument("size", required=False)
def limit(size: str | None) -> None:
    """Print the limit, or set it for this user; $INFC_CACHE_LIMIT takes precedence.

    \b
      infc cache limit 5GB
      infc cache limit 0
    """
    import os

    from ..cache import LIMIT_VARIABLE, ArtifactCache, cache_limit_bytes, set_cache_limit

    if size is None:
        click.echo(_size(cache_limit_bytes()))
        return
    kept = set_cache_limit(size)
    if LIMIT_VARIABLE in os.environ:
        click.echo(f"note: ${LIMIT_VARIABLE} is set, and goes before it", err=True)
    gone = ArtifactCache(limit_bytes=kept).prune()
    click.echo(f"the limit is {_size(kept)}; removed {_amount(gone)}")


@command.command()
def prune() -> None:
    """Remove artifacts that exceed the limit, and leftovers of killed compilations."""
    from ..cache import ArtifactCache

    click.echo(f"removed {_amount(ArtifactCache().prune())}")


@command.command()
def clear() -> None:
    """Remove everything from the cache."""
    from ..cache import ArtifactCache

    click.echo(f"removed {_amount(ArtifactCache().clear())}")


def _amount(use: "CacheUse") -> str:
    from ...ir.sizes import format_count

    return f"{format_count(use.num_artifacts, 'artifact')}, {_size(use.size_bytes)}"


def _size(count: int) -> str:
    """In powers of 1000, as limits are written."""
    return f"{count / 1e9:.2f} GB" if count >= 10**9 else f"{count / 1e6:.1f} MB"
