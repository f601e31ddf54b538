"""infc on Ray: `app` and `build` for Ray Serve, `generate` for Ray Data."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .driver.ray.data import generate
    from .driver.ray.serve import app, build

__all__ = ["app", "build", "generate"]

# Each is imported when first asked for: who serves needs nothing of what batches take.
_HOMES = {
    "app": ("serve", "app"),
    "build": ("serve", "build"),
    "generate": ("data", "generate"),
}


if not TYPE_CHECKING:  # hidden from type checkers, so that they still catch a misspelt name

    def __getattr__(name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, attribute = _HOMES[name]
        value = getattr(import_module(f".driver.ray.{module}", __package__), attribute)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
