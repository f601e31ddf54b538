"""Compilers of the backends by name; each is imported only when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ir.backends import find_backend
from ..ir.errors import UsageError
from .base import Backend


def get_backend(name: str, recipe: Mapping[str, Any] | None = None) -> Backend:
    """The compiler of that name, with the options that its section of a recipe gives.

    `recipe` is a resolved recipe, as a manifest keeps it; without one, options have their
    defaults. UsageError with the nearest name for an unknown one.
    """
    info = find_backend(name)
    kind, section = info.load_compiler(), info.load_section()
    options = [] if section is None else [_options(name, section, (recipe or {}).get(name) or {})]
    backend: Backend = kind(*options)
    return backend


def _options(name: str, section: Any, given: Mapping[str, Any]) -> Any:
    try:
        return section(**given)
    except TypeError as error:  # of an artifact of another version of a plug-in
        raise UsageError(
            f"the backend {name} does not have these options: {error}",
            hint="use the version of its package that compiled the artifact",
        ) from None
