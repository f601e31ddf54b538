"""Options of an engine, the same for the commands that answer many requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from .threads_option import threads_option

_Function = TypeVar("_Function", bound=Callable[..., Any])


def engine_options(function: _Function) -> _Function:
    """--threads, --weights, --max-context, --max-sequences and --kv-memory, in this order."""
    options = (
        threads_option("by default as compiled"),
        click.option(
            "--weights",
            type=click.Choice(["auto", "mapped", "copied"]),
            help="Use weights in the file or copy them; by default as compiled.",
        ),
        click.option(
            "--max-context", type=click.IntRange(min=2), help="At most the compiled value."
        ),
        click.option(
            "--max-sequences", type=click.IntRange(min=1), help="At most the compiled value."
        ),
        click.option(
            "--kv-memory",
            metavar="SIZE",
            help="Memory for the KV cache of an engine, such as 1GiB.",
        ),
    )
    for option in reversed(options):  # the last that is applied comes first in the help
        function = option(function)
    return function
