"""The calibration text of a recipe, as the tokens that methods of quantization look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..ir.errors import UsageError
from .recipe import LoadedRecipe
from .texts import Text, checkpoint_tokenizer, read_text, tokenize

if TYPE_CHECKING:
    from ..ir.program import Program
    from ..passes.methods.calibration import Calibration
    from ..passes.methods.feedback import CompiledRounding

WINDOW_TOKENS: Final = 512
"""Tokens of a window: attention is quadratic in it, and longer ones brought nothing."""
LEAST_TOKENS: Final = 1024
"""Fewer say too little of a model, unless the recipe asks for fewer."""


def recipe_text(loaded: LoadedRecipe) -> Text | None:
    """The calibration text that a recipe's method needs; None where it needs none.

    Raises UsageError for a text that cannot be read.
    """
    how = loaded.recipe.quantization
    if not how.is_calibrated:
        return None
    return read_text(how.calibration.text, loaded.directory)


def make_calibration(
    text: Text,
    loaded: LoadedRecipe,
    model: Path,
    program: Program,
    directory: Path,
    log: Callable[[str], None],
    compiled: Mapping[str, CompiledRounding],
) -> Calibration:
    """The text in windows of the model's tokens; what is made of weights is kept in `directory`.

    `compiled` has schemes that compiled code rounds to.

    Raises UsageError where there is too little text, or no tokenizer to make tokens of it.
    """
    from ..passes.methods.calibration import Calibration
    from ..passes.methods.spill import SpillFile

    wanted = loaded.recipe.quantization.calibration.tokens
    vocab_size = program.spec.vocab_size
    tokenizer = checkpoint_tokenizer(model, vocab_size=vocab_size)
    if tokenizer is None:
        raise UsageError(
            "the checkpoint has no tokenizer, which calibration needs",
            where=model.name,
            hint="set quantization.method to nearest",
        )
    tokens = tokenize(
        text,
        tokenizer,
        vocab_size=vocab_size,
        max_tokens=wanted,
        least_tokens=min(wanted, LEAST_TOKENS),
    )
    if tokens.num_tokens < wanted:
        have = f"calibrating on {tokens.num_tokens} tokens"
        log(f"{have}: {text.name} has no more, and {wanted} are asked for")
    length = min(WINDOW_TOKENS, program.spec.max_context)
    windows = tuple(tokens.windows(length))
    return Calibration(windows, SpillFile(directory), tokens.as_data(), compiled=compiled)
