"""What is said of a recipe that its model refuses: which key, where it stands, what to write."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from ..ir.errors import RecipeError
from ..ir.nearest import nearest
from .yaml_tree import KeyPath, YamlTree

_NOT_BUILT: dict[KeyPath, frozenset[str]] = {
    ("dtype",): frozenset({"float8", "float64"}),
    ("quantization", "method"): frozenset({"awq", "smoothquant", "rotate", "hqq"}),
    ("quantization", "scheme"): frozenset({"nf4", "mxfp4", "gptq", "awq", "q4_k_m", "q5_0"}),
    ("kv_cache", "dtype"): frozenset({"float8", "int4"}),
}


def explain(tree: YamlTree, error: ErrorDetails, recipe: type[BaseModel]) -> RecipeError:
    """The error of a recipe, with the place of the key; `recipe` has the keys that there are."""
    # The last parts may be what a validator calls itself.
    path: KeyPath = tuple(p for p in error["loc"] if not str(p).startswith("literal["))
    name, value = ".".join(map(str, path)), error["input"]
    where = tree.place(path)
    if error["type"] == "extra_forbidden":
        return RecipeError(f"unknown key {name!r}", where=where, hint=_nearest_key(path, recipe))
    if error["type"] == "missing":
        return RecipeError(f"the key {name!r} is missing", where=where, hint=f"{name}: ...")
    if isinstance(value, str) and value in _NOT_BUILT.get(path, ()):
        built = error["ctx"]["expected"]
        return RecipeError(
            f"{name}: {value} is not supported", where=where, hint=f"supported: {built}"
        )
    if error["type"] == "literal_error":
        known = error["ctx"]["expected"]
        return RecipeError(f"{name} cannot be {value!r}", where=where, hint=f"choose {known}")
    if error["type"] in ("model_type", "dict_type"):
        return RecipeError(f"{name} cannot be {value!r}: expected a mapping", where=where)
    problem = error["msg"][:1].lower() + error["msg"][1:]
    shown = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:60]}..."
    return RecipeError(f"{name} cannot be {shown}: {problem}", where=where)


def _nearest_key(path: KeyPath, recipe: type[BaseModel]) -> str:
    """A suggestion: the key of that section spelt most alike, else of any, else the list."""
    every = list(_all_keys(recipe))
    prefix = "".join(f"{part}." for part in path[:-1])
    here = [key[len(prefix) :] for key in every if key.startswith(prefix)]
    here = [key for key in here if "." not in key]
    word = str(path[-1])
    if near := nearest(word, here, cutoff=0.5):
        return f"did you mean {prefix + near!r}?"
    by_last_word = {key.rpartition(".")[2]: key for key in every}
    if near := nearest(word, by_last_word):
        return f"did you mean {by_last_word[near]!r}?"
    return f"known: {', '.join(here)}"


def _all_keys(section: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, info in section.model_fields.items():
        yield prefix + name
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _all_keys(info.annotation, f"{prefix}{name}.")
