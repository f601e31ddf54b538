"""`infc cache`: where compiled artifacts are kept, how much they take, and how to drop them."""

import click


@click.group("cache")
def command() -> None:
    """Show or clear the cache of compiled artifacts.

    \b
      infc cache size
      infc cache clear
      INFC_CACHE_LIMIT=5GB infc compile model.yaml
    """


@command.command()
def path() -> None:
    """Print where the cache lies."""
    from ..cache import cache_directory

    click.echo(cache_directory())


@command.command()
def size() -> None:
    """Print how much the cache holds, and its limit."""
    from ...ir.sizes import format_count
    from ..cache import ArtifactCache

    use = ArtifactCache().use()
    held, limit = use.size_bytes / 1e9, use.limit_bytes / 1e9
    count = format_count(use.num_artifacts, "artifact")
    click.echo(f"{count}, {held:.2f} GB of at most {limit:.2f} GB")


@command.command()
def clear() -> None:
    """Remove everything from the cache."""
    from ...ir.sizes import format_count
    from ..cache import ArtifactCache

    before = ArtifactCache().clear()
    count = format_count(before.num_artifacts, "artifact")
    click.echo(f"removed {count}, {before.size_bytes / 1e9:.2f} GB")
