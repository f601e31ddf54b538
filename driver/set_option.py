"""--set, the same for every command that may have to compile a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

_Function = TypeVar("_Function", bound=Callable[..., Any])


def set_option(function: _Function) -> _Function:
    """Adds `--set KEY=VALUE` to a command, which takes it as `overrides`."""
    return click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a key of the recipe when compiling; repeatable.",
    )(function)
