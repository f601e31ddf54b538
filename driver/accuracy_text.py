"""The text that a recipe wants its artifact measured on."""

from __future__ import annotations

from ..ir.errors import RecipeError, UsageError
from .recipe import LoadedRecipe
from .texts import Text, read_text


def read_evaluation(loaded: LoadedRecipe) -> Text:
    """What `accuracy.evaluation` names; RecipeError with its line for what cannot be read."""
    try:
        return read_text(loaded.recipe.accuracy.evaluation, loaded.directory)
    except UsageError as error:
        place = loaded.tree.place(("accuracy", "evaluation"))
        raise RecipeError(
            f"accuracy.evaluation: {error.where}: {error.message}", where=place, hint=error.hint
        ) from None
