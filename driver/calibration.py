"""The calibration text of a recipe, as the tokens that methods of quantization look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..ir.errors import CapacityError, InfcError, UsageError
from ..ir.machine import available_memory
from ..ir.program import Value, WeightRef
from ..ir.sizes import format_size
from .recipe import LoadedRecipe
from .texts import Text, checkpoint_tokenizer, read_text, tokenize

if TYPE_CHECKING:
    from ..ir.program import Operand, Program
    from ..passes.methods.calibration import Calibration
    from ..passes.methods.feedback import CompiledFeedback
    from ..runtime.text.tokenizer import Tokenizer
    from .recipe_quantization import QuantizationSection
    from .texts import TokenText

WINDOW_TOKENS: Final = 512
"""Tokens of a window: attention is quadratic in it, and longer ones brought nothing."""
LEAST_TOKENS: Final = 1024
"""Fewer say too little of a model, unless the recipe asks for fewer."""
AUTO_TOKENS: Final = (8192, 3072, 2048)
"""The most that the cost of a model allows is used, unless the recipe says how many."""
MAX_MOST_COST: Final = 25_000_000_000_000
"""Operations of a calibration on the most tokens: on fewer, int4 is hardly further away.

Two processors take four minutes.
"""
_NEAREST: Final = "set quantization.method to nearest, and channel_scaling to none"
MAX_COST: Final = {8: 100_000_000_000_000, 4: 300_000_000_000_000}
"""Operations of a calibration that nobody asked for, by bits: with 8, there is little to gain.

Two processors take ten minutes, or half an hour.
"""


def recipe_text(loaded: LoadedRecipe) -> Text | None:
    """The calibration text that a recipe's method needs; None where it needs none.

    Raises UsageError for a text that cannot be read.
    """
    how = loaded.recipe.quantization
    if not how.is_calibrated:
        return None
    return read_text(how.calibration.text, loaded.directory)


def check_text(text: Text | None, loaded: LoadedRecipe, model: Path) -> None:
    """Raises the errors of `make_calibration` that need no program: before one is captured.

    Only where the recipe wants a calibration: else it is rounded to nearest.
    """
    how = loaded.recipe.quantization
    if text is not None and how.must_calibrate:
        least = _least_tokens(how)
        tokenizer = _tokenizer(model, None)
        tokenize(text, tokenizer, vocab_size=None, max_tokens=least, least_tokens=least)


def _least_tokens(how: QuantizationSection) -> int:
    """Of how many tokens a text must be: what is used without being asked for is more."""
    return min(how.calibration.tokens or LEAST_TOKENS, LEAST_TOKENS)


def _tokenizer(model: Path, vocab_size: int | None) -> Tokenizer:
    """The tokenizer of a checkpoint; UsageError if it has none."""
    tokenizer = checkpoint_tokenizer(model, vocab_size=vocab_size)
    if tokenizer is None:
        raise UsageError(
            "the checkpoint has no tokenizer, which calibration needs",
            where=model.name,
            hint=_NEAREST,
        )
    return tokenizer


def make_calibration(
    text: Text,
    loaded: LoadedRecipe,
    model: Path,
    program: Program,
    directory: Path,
    log: Callable[[str], None],
    compiled: Mapping[str, CompiledFeedback],
) -> Calibration | None:
    """The text in windows of the model's tokens; what is made of weights is kept in `directory`.

    `compiled` has schemes that compiled code rounds to. None, and a remark, if the recipe leaves
    the method open and the model cannot be calibrated, or only at a cost beyond `MAX_COST`.

    Raises UsageError where there is too little text, or no tokenizer to make tokens of it, and
    CapacityError where the values of all tokens do not fit into memory.
    """
    from ..passes.methods.calibration import Calibration
    from ..passes.methods.spill import SpillFile

    how = loaded.recipe.quantization
    length = min(WINDOW_TOKENS, program.spec.max_context)
    try:
        tokens = _tokens(text, how, model, program, log)
    except InfcError as error:
        if how.must_calibrate:
            raise
        log(f"weights are rounded to nearest: {error.message}")
        return None
    # Never a reason to round to nearest: the same recipe makes the same weights on every machine.
    _check_memory(program, length, tokens.num_tokens)
    windows = tuple(tokens.windows(length))
    return Calibration(windows, SpillFile(directory), tokens.as_data(), compiled=compiled)


def _tokens(
    text: Text,
    how: QuantizationSection,
    model: Path,
    program: Program,
    log: Callable[[str], None],
) -> TokenText:
    wanted = how.calibration.tokens or _affordable(program, how)
    vocab_size = program.spec.vocab_size
    tokens = tokenize(
        text,
        _tokenizer(model, vocab_size),
        vocab_size=vocab_size,
        max_tokens=wanted,
        least_tokens=min(wanted, LEAST_TOKENS),
    )
    if tokens.num_tokens < wanted:
        have = f"calibrating on {tokens.num_tokens} tokens"
        log(f"{have}: {text.name} has no more, and {wanted} are asked for")
    return tokens


def _affordable(program: Program, how: QuantizationSection) -> int:
    """How many tokens the model is calibrated on; UsageError if it would take too long."""
    runs = 2 if how.scaling_method == "none" else 3
    most = MAX_COST[4 if how.has_four_bits else 8]
    for tokens in AUTO_TOKENS:
        limit = min(most, MAX_MOST_COST) if tokens == AUTO_TOKENS[0] else most
        if calibration_cost(program, tokens, runs) <= limit:
            return tokens
    if how.must_calibrate:
        return AUTO_TOKENS[-1]
    raise UsageError("calibrating so large a model takes long; quantization.method=gptq does it")


def calibration_cost(program: Program, tokens: int, runs: int = 2) -> int:
    """Roughly the operations of calibrating every product of a program.

    Each token runs through the model `runs` times (the source, the quantized one, and where scales
    are searched), and is part of two matrices of moments of each input, of each of its experts too.
    Feedback and the correction of a matrix `[N, K]` take three times N K^2.
    """
    from ..passes.scheme_choices import QUANTIZED
    from ..passes.text_runs import window_flops

    length = min(WINDOW_TOKENS, program.spec.max_context)
    each_token = runs * window_flops(program, length, length) // length
    moments: dict[str, int] = {}
    matrices = 0
    for node in program.nodes:
        if node.op not in QUANTIZED or node.op == "embedding":
            continue
        routed = _routed(node.inputs[1]) if node.op == "moe" else 1
        for place in QUANTIZED[node.op]:
            *experts, rows, depth = _shape(program, node.inputs[place])
            matrices += 3 * math.prod(experts) * rows * depth * depth
            key = f"{node.inputs[0]} {place if experts else ''}"
            moments[key] = 4 * depth * depth * routed
    return tokens * (each_token + sum(moments.values())) + matrices


def _routed(index: Operand) -> int:
    """How many experts each token reaches, from their numbers `[T, count]`."""
    assert isinstance(index, Value)
    count = index.type.shape[-1]
    assert isinstance(count, int)
    return count


def _shape(program: Program, matrix: Operand) -> list[int]:
    assert isinstance(matrix, WeightRef)
    return [dim for dim in program.weights[matrix.name].type.shape if isinstance(dim, int)]


def _check_memory(program: Program, window: int, num_tokens: int) -> None:
    """CapacityError if what two runs of the program keep of every token is more than is free."""
    from ..passes.methods.layer_runs import bytes_per_token

    each = 2 * bytes_per_token(program, window)  # the source model, and the quantised one
    if each * num_tokens <= (free := available_memory()):
        return
    fitting = free // each // window * window
    raise CapacityError(
        f"calibrating on {num_tokens} tokens takes {format_size(each * num_tokens)}, and"
        f" {format_size(free)} are free",
        where="quantization.calibration.tokens",
        hint=f"ask for {fitting} or less" if fitting >= window else _NEAREST,
    )
