"""The backend of a recipe: which names there are, and the section of keys that one declares."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import AfterValidator, Field, WithJsonSchema, create_model
from pydantic_core import PydanticCustomError

from ..ir.backends import BackendInfo, known_backend, known_backends
from ..ir.errors import RecipeError, UsageError
from ..ir.plugins import load_plugins
from .recipe_keys import Section, key
from .yaml_tree import YamlTree

_Recipe = TypeVar("_Recipe", bound=Section)


def _check_backend(name: str) -> str:
    if _find(name) is None:
        names = [repr(one.name) for one in known_backends()]
        expected = f"{', '.join(names[:-1])} or {names[-1]}"
        raise PydanticCustomError("literal_error", "no such backend", {"expected": expected})
    return name


def _find(name: str) -> BackendInfo | None:
    """The backend of that name, of a plug-in if need be."""
    if known_backend(name) is None:
        load_plugins()
    return known_backend(name)


BackendName = Annotated[
    str,
    AfterValidator(_check_backend),
    # Plug-ins bring others, so that the schema cannot list them all.
    WithJsonSchema({"type": "string", "examples": [one.name for one in known_backends()]}),
]
"""The name of a backend, of infc's own or of a plug-in."""


def with_section(recipe: type[_Recipe], tree: YamlTree, default: str) -> type[_Recipe]:
    """`recipe` with the keys of the backend that the tree chooses, under the backend's name.

    It is `recipe` itself for a backend without keys, or an unknown one. RecipeError for keys of
    another backend: they would have no effect.
    """
    chosen = tree.data.get("backend", default)
    info = _find(chosen) if isinstance(chosen, str) else None
    for one in known_backends():
        if one.section is not None and one.name in tree.data and one.name != chosen:
            raise RecipeError(
                f"{one.name} has no effect, because backend is {chosen}",
                where=tree.place((one.name,)),
                hint=f"set backend: {one.name}, or remove the section",
            )
    section = None if info is None else info.load_section()
    if info is None or section is None:
        return recipe
    if info.name in recipe.model_fields:
        raise UsageError(
            f"the backend {info.name} has a section, but a recipe has a key of that name",
            where=info.section,
        )
    try:
        kind = _section_model(info.name, section)
        keys = Field(default=kind(), description=f"Options of the backend {info.name}.")
    except Exception as error:  # of a plug-in: an unknown annotation, a default that fails
        reason = str(error).partition("\n")[0]  # pydantic adds how its own users would go on
        raise UsageError(
            f"the section of the backend {info.name} cannot be read:"
            f" {type(error).__name__}: {reason}",
            where=info.section,
        ) from error
    fields: dict[str, Any] = {info.name: (kind, keys)}
    return create_model(recipe.__name__, __base__=recipe, **fields)


def _section_model(name: str, section: type) -> type[Section]:
    """A backend's dataclass of options as a section that is read strictly."""
    hints = get_type_hints(section)
    fields: dict[str, Any] = {
        one.name: (hints[one.name], key(_default(one), one.metadata.get("doc", "")))
        for one in dataclasses.fields(section)
    }
    return create_model(f"{name.capitalize()}Section", __base__=Section, **fields)


def _default(option: dataclasses.Field[Any]) -> Any:
    """The value of an option that a recipe does not give."""
    factory = option.default_factory
    return option.default if factory is dataclasses.MISSING else factory()
