"""Plug-ins: installed packages that bring ops, passes and kernels of their own."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .errors import UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP: Final = "infc.plugins"
"""The entry point group. What an entry names is imported, and called where it is a function."""
SWITCH: Final = "INFC_PLUGINS"
"""The environment variable that, set to 0, leaves every plug-in alone."""


@dataclass(frozen=True, slots=True)
class Plugin:
    """An installed plug-in: its entry point, and the distribution it came with."""

    name: str
    target: str
    distribution: str
    version: str


_loaded: list[Plugin] | None = None


def load_plugins() -> tuple[Plugin, ...]:
    """Import every installed plug-in, once a process; what they register is then known by name.

    Called only when something is asked for that infc itself does not have: a serving process,
    and a compilation that needs none, import nothing. UsageError names a plug-in that does not
    load, and its package.
    """
    global _loaded
    if _loaded is None:
        _loaded = []  # before loading: what a plug-in looks up must not load it again
        if os.environ.get(SWITCH) != "0":
            # Takes 10 ms to import, which those who open an artifact need not wait for.
            from importlib.metadata import entry_points

            for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
                _loaded.append(_load(entry))
    return tuple(_loaded)


def _load(entry: EntryPoint) -> Plugin:
    package = entry.dist
    name, version = (package.name, package.version) if package else ("an unknown package", "?")
    try:
        found = entry.load()
        if callable(found):
            found()
    except Exception as error:
        raise UsageError(
            f"plug-in {entry.name} of {name} {version} cannot be loaded: "
            f"{type(error).__name__}: {error}",
            where=entry.value,
            hint=f"fix or uninstall {name}, or set {SWITCH}=0 to disable plug-ins",
        ) from error
    return Plugin(entry.name, entry.value, name, version)
