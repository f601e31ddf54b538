"""Passes by name: our own, those a user registers, and those of a module named in a recipe."""

from __future__ import annotations

import importlib

from ..ir.errors import InfcError, UsageError
from ..ir.nearest import did_you_mean
from ..ir.plugins import load_plugins
from .base import PIPELINE_PHASES, Pass
from .catalogue import OUR_PASSES
from .user_code import failed_at

_REGISTRY: dict[str, type[Pass]] = {kind.name: kind for kind in OUR_PASSES}


def register_pass(kind: type[Pass]) -> type[Pass]:
    """Makes a pass available by its name; can be used as a decorator.

    A pass with the same name is replaced, so that a cell of a notebook can run again. Raises
    UsageError if the name is that of a built-in pass, or if `kind` is not a pass.
    """
    if not (isinstance(kind, type) and issubclass(kind, Pass)):
        raise UsageError(f"{kind!r} is not a pass", hint="derive it from infc.passes.base.Pass")
    if not getattr(kind, "name", "") or getattr(kind, "phase", "") not in PIPELINE_PHASES:
        raise UsageError(
            f"{kind.__name__} lacks a name, or a phase out of {', '.join(PIPELINE_PHASES)}"
        )
    known = _REGISTRY.get(kind.name)
    if known is not None and known is not kind and known in OUR_PASSES:
        raise UsageError(
            f"{kind.name} is the name of a built-in pass",
            where=f"{kind.__module__}.{kind.__qualname__}",
            hint="give it another name",
        )
    _REGISTRY[kind.name] = kind
    return kind


def get_pass(name: str) -> type[Pass]:
    """The pass of that name, of a plug-in if need be, or the one that `module:Name` says.

    UsageError with the nearest name where there is none.
    """
    if ":" in name:
        return load(name)
    found = _REGISTRY.get(name)
    if found is None:
        load_plugins()
        found = _REGISTRY.get(name)
    if found is None:
        hint = did_you_mean(name, _REGISTRY, "infc passes lists them")
        raise UsageError(f"unknown pass {name}", hint=hint)
    return found


def load(path: str) -> type[Pass]:
    """The pass that `my_module:MyPass` names; the module is imported.

    UsageError where the module, the name in it, or its being a pass is missing.
    """
    module_name, _, attribute = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UsageError(
            f"cannot import {module_name}: {error}",
            where=path,
            hint=_import_hint(error, module_name),
        ) from error
    except Exception as error:
        what = str(error) if isinstance(error, InfcError) else f"{type(error).__name__}: {error}"
        raise UsageError(
            f"{module_name} cannot be executed: {what}{_line_of(error)}",
            where=path,
            hint=f"`python -c 'import {module_name}'` shows the traceback",
        ) from error
    kind = getattr(module, attribute, None)
    if kind is None:
        hint = did_you_mean(attribute, vars(module))
        raise UsageError(f"module {module_name} has no {attribute}", where=path, hint=hint)
    if not (isinstance(kind, type) and issubclass(kind, Pass)):
        raise UsageError(
            f"{attribute} is not a pass",
            where=path,
            hint="make it with infc.rewrite, or derive it from infc.passes.base.Pass",
        )
    return register_pass(kind)


def _line_of(error: Exception) -> str:
    place = failed_at(error)
    return "" if place is None or isinstance(error, SyntaxError) else f" ({place})"


def _import_hint(error: ImportError, module_name: str) -> str:
    if error.name is not None and error.name != module_name.partition(".")[0]:
        return f"{module_name} was found, and what it imports was not"
    return "put it beside the recipe or into the working directory, or install it"
