"""The JSON files of a tokenizer, checked before a library takes memory for what they say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from ..ir.errors import CheckpointError
from .config import read_json

# Tokenizers may know more ids than the model has: those of other models of its family, or of
# inputs other than text. But each id up to the largest takes memory.
_SPARE_IDS: Final = 1 << 20
_MOST_IDS: Final = 1 << 24
_AGAIN: Final = "download the checkpoint again"


def check_tokenizer_files(directory: Path, vocab_size: int | None) -> None:
    """Refuses a `tokenizer.json` or `tokenizer_config.json` that no library could read.

    Ids may go up to twice the model's `vocab_size` and some more. Raises CheckpointError, naming
    file and token.
    """
    settings = directory / "tokenizer_config.json"
    if settings.exists():
        read_json(settings)
    path = directory / "tokenizer.json"
    if not path.exists():
        return
    data = read_json(path)
    if not isinstance(data.get("model"), dict):
        raise CheckpointError(
            "the tokenizer cannot be read: it has no model", where=str(path), hint=_AGAIN
        )
    limit = _MOST_IDS if vocab_size is None else 2 * vocab_size + _SPARE_IDS
    for token, number in _ids(data):
        if isinstance(number, int) and not 0 <= number < limit:
            size = "" if vocab_size is None else f", and the model has {vocab_size} tokens"
            raise CheckpointError(
                f"token {token!r} has the id {number}{size}", where=str(path), hint=_AGAIN
            )


def _ids(data: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Tokens with their ids, of the model and of what was added to it."""
    vocabulary = data["model"].get("vocab")
    if isinstance(vocabulary, dict):
        yield from vocabulary.items()
    added = data.get("added_tokens")
    for one in added if isinstance(added, list) else ():
        if isinstance(one, dict):
            yield one.get("content"), one.get("id")
