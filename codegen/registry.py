"""The backends by name; each is imported only when it is asked for."""

from __future__ import annotations

import importlib

from ..ir.errors import UsageError
from .base import Backend

_BACKENDS = {
    "cpp": ("cpp.backend", "CppBackend"),
    "reference": ("reference.backend", "ReferenceBackend"),
}


def get_backend(name: str) -> Backend:
    """The backend of that name; `UsageError` lists the known ones."""
    if name not in _BACKENDS:
        raise UsageError(f"unknown backend {name!r}", hint=f"choose one of: {', '.join(_BACKENDS)}")
    module_name, class_name = _BACKENDS[name]
    module = importlib.import_module(f".{module_name}", __package__)
    backend: Backend = getattr(module, class_name)()
    return backend
