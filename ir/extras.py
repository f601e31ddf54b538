"""What `pip install infc` leaves out, and the one line that says how to get it."""

from __future__ import annotations

import importlib.util

from .errors import ToolchainError

COMPILE_LIBRARIES = ("torch", "transformers")
INSTALL_COMPILE = "pip install 'infc[compile]'"


def require_compiler(purpose: str) -> None:
    """Raises ToolchainError where a library of the extra `compile` is not installed."""
    for name in COMPILE_LIBRARIES:
        if importlib.util.find_spec(name) is None:
            raise missing_library(name, purpose)


def missing_library(name: str, purpose: str) -> ToolchainError:
    """The error that says which library is missing, for what, and the command that installs it."""
    return ToolchainError(f"{purpose} needs {name}, which is not installed", hint=INSTALL_COMPILE)
