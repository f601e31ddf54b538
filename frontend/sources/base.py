"""What the frontend asks of a model, whatever it is stored as."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class SourceTokenizer:
    """The tokenizer of a model: `text` is a `tokenizer.json`, templates go by their names.

    `bos` and `eos` are ids as the model states them, all that end a text; `special_tokens` are
    the texts that templates may name, `special_texts` those of all special tokens; `generation` is
    what a `generation_config.json` says.
    """

    text: str
    bos: tuple[int, ...]
    eos: tuple[int, ...]
    special_tokens: Mapping[str, str]
    special_texts: Collection[str]
    templates: Mapping[str, str]
    generation: Mapping[str, Any]


class ModelSource(Protocol):
    """A model on disk: configuration, tensors and tokenizer.

    Every method raises CheckpointError, naming file and key or tensor, for what is missing,
    damaged or contradicts itself, and UnsupportedModelError for what infc does not compile.
    """

    def read_config(self, *, allow_remote_code: bool, log: Callable[[str], None]) -> Any:
        """The configuration as transformers has it; `log` is told what has no effect."""

    def open_weights(self) -> Checkpoint:
        """The tensors, mapped, every header checked."""

    def check_tokenizer(self, vocab_size: int | None) -> None:
        """Refuses a tokenizer that could not be read, as far as that shows at once."""

    def read_tokenizer(self, vocab_size: int | None) -> SourceTokenizer | None:
        """The tokenizer; None where the model has none. `vocab_size` is the model's."""
