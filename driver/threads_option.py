"""--threads, the same for every command that opens an artifact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from ..runtime.options import MAX_THREADS

_Function = TypeVar("_Function", bound=Callable[..., Any])


def threads_option(default: str) -> Callable[[_Function], _Function]:
    """The option; `default` says in words how many threads there are where it is not given."""
    return click.option(
        "--threads", type=click.IntRange(1, MAX_THREADS), help=f"Threads; {default}."
    )
