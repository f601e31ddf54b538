"""What a checkpoint's generation_config.json recommends, as the manifest keeps it."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

# Read elsewhere: what begins, ends and pads a text.
_TOKENS: Final = frozenset(
    {"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"}
)
_ABOUT: Final = frozenset({"transformers_version"})
_APPLIED: Final = ("bad_words_ids", "sequence_bias", "stop_strings", "suppress_tokens")
"""Lists that change what a request gets, which `temperature` and its like do not surprise with."""

_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Leaves out token ids that a model does not have (`size` None: all are taken), and says so."""

    size: int | None
    log: Callable[[str], None]

    def has(self, token: Any) -> bool:
        """Whether an entry of a list is a token that the model has, or no id at all."""
        is_id = isinstance(token, int) and not isinstance(token, bool)
        return not is_id or self.size is None or 0 <= token < self.size

    def known(self, name: str, ids: Iterable[int]) -> tuple[int, ...]:
        """The ids that the model has."""
        given = tuple(ids)
        self.report(name, [one for one in given if not self.has(one)])
        return tuple(one for one in given if self.has(one))

    def report(self, name: str, strangers: list[Any]) -> None:
        """One line about ids that were left out, if any were."""
        if strangers:
            shown = ", ".join(map(str, strangers[:_SHOWN]))
            more = ", ..." if len(strangers) > _SHOWN else ""
            self.log(f"{name} {shown}{more} left out: outside the vocabulary of {self.size} tokens")


def generation_defaults(
    settings: Mapping[str, Any],
    eos: tuple[int, ...],
    vocabulary: Vocabulary,
    special_texts: Collection[str] = (),
) -> dict[str, Any] | None:
    """Every setting of generation_config.json: who serves says what it makes of each.

    `special_texts` are the special tokens: a stop string with one of them and other characters is
    left out with a remark, as it could never be found in the text of an answer.
    """
    kept = {}
    for key, value in sorted(settings.items()):
        if value is None or key.startswith("_") or key in _TOKENS or key in _ABOUT:
            continue
        if not _is_finite(value):
            vocabulary.log(f"generation_config.json: {key} left out: not finite")
            continue
        kept[key] = _within(key, value, eos, vocabulary)
        if key == "stop_strings":
            kept[key] = _findable(value, vocabulary, special_texts)
    if applied := [key for key in _APPLIED if kept.get(key)]:
        vocabulary.log(
            f"generation_config.json sets {', '.join(applied)}: the default of every request"
        )
    return kept or None


def _is_finite(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def _within(key: str, value: Any, eos: tuple[int, ...], vocabulary: Vocabulary) -> Any:
    """A list without what names tokens that the model does not have."""
    if key not in _APPLIED or not isinstance(value, list):
        return value
    strangers = [one for one in value if not all(map(vocabulary.has, _tokens(key, one)))]
    vocabulary.report(key, strangers)
    kept = [one for one in value if one not in strangers]
    if key == "bad_words_ids":  # an end token among them is not meant, as in transformers
        kept = [one for one in kept if one not in [[end] for end in eos]]
    return kept


def _findable(value: Any, vocabulary: Vocabulary, special_texts: Collection[str]) -> Any:
    if not isinstance(value, (str, list)):
        return value
    hidden = [text for text in special_texts if len(text) > 1]
    kept = []
    for stop in [value] if isinstance(value, str) else value:
        if isinstance(stop, str) and stop not in special_texts and any(t in stop for t in hidden):
            vocabulary.log(
                f"generation_config.json: the stop string {stop!r} left out: it holds a special"
                " token, which is never part of the text"
            )
        else:
            kept.append(stop)
    return kept


def _tokens(key: str, entry: Any) -> list[Any]:
    """The ids in an entry of a list."""
    if key == "sequence_bias" and isinstance(entry, list) and entry:
        entry = entry[0]
    if key == "stop_strings":
        return []
    return entry if isinstance(entry, list) else [entry]
