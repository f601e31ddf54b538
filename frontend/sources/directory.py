"""A checkpoint directory as Hugging Face lays it out: JSON files, safetensors, a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ...ir.errors import CheckpointError
from ..checkpoint import Checkpoint, open_checkpoint
from ..config import read_config, read_json
from ..quiet import quiet_transformers
from ..tokenizer_files import check_tokenizer_files
from .base import SourceTokenizer

# Any of these says that the checkpoint means to have a tokenizer.
_TOKENIZERS: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


@dataclass(frozen=True, slots=True)
class DirectorySource:
    """See `ModelSource`."""

    path: Path

    def read_config(self, *, allow_remote_code: bool, log: Callable[[str], None]) -> Any:
        return read_config(self.path, allow_remote_code=allow_remote_code)

    def open_weights(self) -> Checkpoint:
        return open_checkpoint(self.path)

    def check_tokenizer(self, vocab_size: int | None) -> None:
        check_tokenizer_files(self.path, vocab_size)

    def read_tokenizer(self, vocab_size: int | None) -> SourceTokenizer | None:
        """A tokenizer of the older kind is converted through transformers."""
        if not any((self.path / name).exists() for name in _TOKENIZERS):
            return None
        check_tokenizer_files(self.path, vocab_size)
        library = _load(self.path)
        generation = _optional_json(self.path / "generation_config.json")
        config = _text_settings(_optional_json(self.path / "config.json"))
        template = library.chat_template
        named = template if isinstance(template, Mapping) else {"default": template}
        return SourceTokenizer(
            text=_backend_text(library, self.path),
            bos=_ids(library.bos_token_id)[:1],
            eos=_eos_ids(library.eos_token_id, generation, config),
            special_tokens=library.special_tokens_map,
            special_texts=_special_texts(library),
            templates={name: str(text) for name, text in named.items() if text is not None},
            generation=generation,
        )


def _load(source: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(
                source, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        # Tokenizers raise plain Exception, and each class what it likes.
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the tokenizer cannot be read: {reason}", where=str(source)
        ) from error


def _backend_text(library: Any, source: Path) -> str:
    """The text of `tokenizer.json`."""
    backend = getattr(library, "backend_tokenizer", None)
    if backend is None:
        from transformers.convert_slow_tokenizer import convert_slow_tokenizer

        try:
            backend = convert_slow_tokenizer(library)
        except Exception as error:
            # As above: whatever the converter of one class does not expect.
            raise CheckpointError(
                f"tokenizer {type(library).__name__} cannot be converted: {error}",
                where=str(source),
            ) from error
    text: str = backend.to_str(pretty=False)
    return text


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _text_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Of a model with other inputs, its text part's settings stand below, and some above too."""
    part = config.get("text_config")
    own = {key: value for key, value in config.items() if value is not None}
    return {**part, **own} if isinstance(part, dict) else config


def _ids(value: Any) -> tuple[int, ...]:
    listed = value if isinstance(value, list) else [value]
    return tuple(one for one in listed if isinstance(one, int) and not isinstance(one, bool))


def _special_texts(library: Any) -> list[str]:
    return [t.content for t in library.added_tokens_decoder.values() if t.special and t.content]


def _eos_ids(own: Any, generation: dict[str, Any], config: dict[str, Any]) -> tuple[int, ...]:
    """Whatever ends an answer by the word of the generation settings, the model or the tokenizer.

    Each of the three knows ends that another leaves out: a base model's end of text, the end of a
    turn.
    """
    listed = (generation.get("eos_token_id"), config.get("eos_token_id"), own)
    return tuple(dict.fromkeys(token for value in listed for token in _ids(value)))
