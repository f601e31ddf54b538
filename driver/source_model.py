"""The checkpoint behind an artifact, run in float32 as it was captured: what builds are held to."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Final

import numpy as np

from ..ir.artifact import Artifact, open_artifact
from ..ir.errors import CapacityError, ContextError, UsageError
from ..ir.extras import require_compiler
from ..ir.machine import available_memory
from ..ir.sizes import format_size
from .bundled import bundled_recipes
from .cache import checkpoint_identity
from .model_source import find_model
from .open_model import is_artifact
from .recipe import LoadedRecipe, is_hub_id, load_recipe
from .texts import checkpoint_tokenizer

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from ..ir.program import Program, WeightLoader
    from ..ir.quantized_pairs import QuantizedPairs
    from ..passes.text_runs import TextRunner
    from ..runtime.text.tokenizer import Tokenizer
    from .progress import Reporter

    Rows = NDArray[np.float64]

SOURCE: Final = "source"
"""What `--against` calls the checkpoint that an artifact was compiled from."""


@dataclass(frozen=True, slots=True)
class SourceModel:
    """A captured checkpoint that runs on the definitions of its ops, window by window.

    Weights are read and widened one at a time, so that memory does not grow with their number.
    """

    name: str
    program: Program
    runner: TextRunner
    tokenizer: Tokenizer | None

    @property
    def vocab_size(self) -> int:
        """How many tokens it knows."""
        return self.program.spec.vocab_size

    def tokenize(self, text: str) -> list[int] | None:
        """The tokens of a text; None if the checkpoint has no tokenizer."""
        return None if self.tokenizer is None else self.tokenizer.encode(text)

    def window(
        self, tokens: Sequence[int], first: int, rows: int, on_share: Callable[[float], None]
    ) -> Iterator[tuple[Rows, Sequence[int]]]:
        """Logits `[n, V]` and targets for tokens[first:], divided as steps of `rows` divide them.

        CapacityError if the window takes more memory than there is.
        """
        last = len(tokens) - 1
        self._check_memory(last)
        wanted = range(max(0, first - 1), last)
        logits = self.runner.run(tokens[:last], on_share).logits(wanted)
        made = (row for part in logits for row in part.double().numpy())
        for start in range(0, last, rows):
            part = range(max(start, first - 1), min(start + rows, last))
            if len(part):
                chunk = np.stack(list(islice(made, len(part))))
                yield chunk, tokens[part.start + 1 : part.stop + 1]

    def _check_memory(self, num_tokens: int) -> None:
        spec = self.program.spec
        scores = 4 * spec.num_heads * num_tokens**2
        needed = 3 * scores + 3 * self.runner.head_rows * 4 * spec.vocab_size
        if needed > (free := available_memory()):
            raise CapacityError(
                f"a window of {num_tokens} tokens takes {format_size(needed)} in float32, and"
                f" {format_size(free)} are free",
                where=self.name,
                hint="choose shorter windows with --context",
            )


def open_other(
    artifact: Artifact, against: str | os.PathLike[str], progress: Reporter
) -> Artifact | SourceModel:
    """What an artifact is compared with: another artifact, or a checkpoint; see `open_source`."""
    if is_artifact(against):
        return open_artifact(against, "stamp", weights="later")
    with progress.stage(f"capture {against}"):
        return open_source(artifact, against, progress.remark)


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads of torch within, where torch is there; the number of before afterwards."""
    try:
        import torch
    except ImportError:  # comparing artifacts does without
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def open_source(
    artifact: Artifact,
    against: str | os.PathLike[str] = SOURCE,
    log: Callable[[str], None] = lambda _: None,
) -> SourceModel:
    """The checkpoint that `against` names, captured in float32 for the context of an artifact.

    `against` is a recipe, the name of a bundled one, a checkpoint directory, a GGUF file, a hub id,
    or `source`:
    what the artifact says that it was compiled from. `log` is told where it is another checkpoint.
    Raises the errors of `load_recipe` and `load_model`, and UsageError where `source` is not known.
    """
    from ..frontend.load import load_model

    require_compiler("comparing with a checkpoint")
    name = os.fspath(against)
    loaded = _recorded_source(artifact) if name == SOURCE else load_recipe(against)
    directory = find_model(loaded.recipe, loaded.directory)
    if checkpoint_identity(directory) != artifact.manifest.checkpoint:
        if name == SOURCE:
            raise _not_recorded(artifact, "what has its name is another checkpoint now")
        log(f"{name} is not the checkpoint that {artifact.path} was compiled from")
    context = artifact.manifest.main.limits.max_context
    try:
        program = load_model(
            directory,
            dtype="float32",
            max_context=context,
            allow_remote_code=loaded.recipe.trust_remote_code,
            log=lambda _: None,
        )
    except ContextError as error:
        raise UsageError(
            f"it is another model than that of {artifact.path}, which has a context of {context}"
            f" tokens: {error.message}",
            where=name,
            hint="compare with the checkpoint that the artifact was compiled from",
        ) from None
    if directory.is_file():
        program = _keeping_weights(program)
    vocab_size = program.spec.vocab_size
    tokenizer = checkpoint_tokenizer(directory, vocab_size=vocab_size)
    return source_model(name, program, tokenizer)


@dataclass(slots=True)
class _KeptTensors:
    """A loader that keeps what it has read, up to so many bytes: the first tensors that fit."""

    loader: WeightLoader
    free_bytes: int
    kept: dict[str, torch.Tensor] = field(default_factory=dict)

    def __call__(self, name: str) -> torch.Tensor:
        if name in self.kept:
            return self.kept[name]
        tensor = self.loader(name)
        if tensor.nbytes <= self.free_bytes:
            self.free_bytes -= tensor.nbytes
            self.kept[name] = tensor
        return tensor


def _keeping_weights(program: Program) -> Program:
    """A program of a GGUF file that dequantises its tensors once, and not in every window.

    They take half of the free memory at most; the others are read again and again.
    """
    kept = _KeptTensors(program.loaders["checkpoint"], available_memory() // 2)
    return replace(program, loaders={**program.loaders, "checkpoint": kept})


def source_model(
    name: str, program: Program, tokenizer: Tokenizer | None, pairs: QuantizedPairs | None = None
) -> SourceModel:
    """A captured program as a model to compare with; UsageError where it cannot run."""
    from ..ir.quantized_pairs import QuantizedPairs
    from ..passes.text_runs import TextRunner
    from ..passes.whole_runs import not_runnable

    if reason := not_runnable(program):
        raise UsageError(f"it cannot be run to compare with it: {reason}", where=name)
    return SourceModel(name, program, TextRunner(program, pairs or QuantizedPairs()), tokenizer)


def _recorded_source(artifact: Artifact) -> LoadedRecipe:
    """The recipe of what an artifact was compiled from, by what its manifest says."""
    recorded = artifact.manifest.recipe
    model = recorded.get("model")
    if not isinstance(model, str):
        raise _not_recorded(artifact, "the artifact does not record its model")
    if model in bundled_recipes():
        return load_recipe(bundled_recipes()[model].path)
    if not is_hub_id(model):
        raise _not_recorded(artifact, f"{model} was a directory, whose place is not recorded")
    kept = {key: recorded[key] for key in ("revision", "trust_remote_code") if recorded.get(key)}
    return load_recipe(model, kept)


def _not_recorded(artifact: Artifact, reason: str) -> UsageError:
    return UsageError(
        f"the source checkpoint is not known: {reason}",
        where=str(artifact.path),
        hint="name it: --against PATH (a checkpoint directory or GGUF file)",
    )
