"""What the engine asks of a request before it queues it; each refusal names its field."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from ...ir.errors import RequestError
from ..sampling.sampling_params import SamplingParams

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

_MAX_SALT_CHARACTERS = 256


class CheckedIds(list[int]):
    """Token ids that were found to be of a vocabulary of `vocab_size`; never changed."""

    __slots__ = ("vocab_size",)

    def __init__(self, token_ids: Sequence[int], vocab_size: int) -> None:
        super().__init__(token_ids)
        self.vocab_size = vocab_size


def checked_ids(token_ids: Sequence[int], vocab_size: int) -> CheckedIds:
    """Token ids as a list; RequestError for what is none of this vocabulary."""
    if isinstance(token_ids, CheckedIds) and token_ids.vocab_size == vocab_size:
        return token_ids  # they may be many, and come through several hands
    if isinstance(token_ids, bytes) or not isinstance(token_ids, Sequence):
        raise RequestError("the prompt must be text or token ids", field="prompt")
    ids = CheckedIds(token_ids, vocab_size)
    if ids and not (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size):
        wrong = next(t for t in ids if type(t) is not int or not 0 <= t < vocab_size)
        raise RequestError(
            f"{reprlib.repr(wrong)} is not a token id, expected 0..{vocab_size - 1}", field="prompt"
        )
    return ids


def check_params(params: Any, *, vocab_size: int, has_tokenizer: bool) -> None:
    """RequestError for what is no SamplingParams, or asks for what the model has not."""
    if not isinstance(params, SamplingParams):
        raise RequestError(
            f"params must be SamplingParams, not {type(params).__name__}",
            field="params",
            hint="write SamplingParams(max_tokens=64)",
        )
    for field, tokens in params.token_fields.items():
        if (token := max(tokens, default=0)) >= vocab_size:
            raise RequestError(
                f"{field}: {token} is not a token id, expected 0..{vocab_size - 1}", field=field
            )
    if params.stop_strings and not has_tokenizer:
        raise RequestError("this model has no tokenizer", field="stop", hint="use stop_token_ids")


def check_choosable(
    params: SamplingParams, end_token_ids: Collection[int], *, vocab_size: int
) -> None:
    """RequestError where nothing may be chosen; ends may not, before `min_tokens` tokens."""
    banned = set(params.banned_token_ids)
    ends = set(end_token_ids if params.min_tokens else ())
    if params.allowed_token_ids is not None:
        if set(params.allowed_token_ids) <= banned | ends:
            raise RequestError(
                "allowed_token_ids leaves only tokens that end the answer, but min_tokens"
                f" ({params.min_tokens}) requires other tokens first",
                field="allowed_token_ids",
                hint="allow another token, or remove min_tokens",
            )
    elif len(banned | ends) >= vocab_size:
        wanted = f", or end the answer before min_tokens ({params.min_tokens})" if ends else ""
        raise RequestError(
            f"all {vocab_size} tokens of the vocabulary are banned{wanted}",
            field="banned_token_ids" if banned else "stop_token_ids",
            hint="leave at least one token",
        )


def stop_texts(
    params: SamplingParams, tokenizer: Tokenizer | None, vocab_size: int
) -> dict[int, str]:
    """The stop strings that are special tokens, by their ids; a model never gives those beyond its
    vocabulary.

    They leave no text in the answer, so nobody would find them there. RequestError for a string
    that has such a token in it beside other characters: it could never come.
    """
    if tokenizer is None or not params.stop_strings or not params.skip_special_tokens:
        return {}
    found = {}
    for stop in params.stop_strings:
        if (token := tokenizer.special_texts.get(stop)) is not None:
            found.update({token: stop} if token < vocab_size else {})
        elif hidden := next((t for t in tokenizer.special_texts if len(t) > 1 and t in stop), None):
            raise RequestError(
                f"the stop string {stop!r:.80} contains the special token {hidden!r}, which is"
                " never part of the text",
                field="stop",
                hint="give the token alone as a stop string, or its id in stop_token_ids",
            )
    return found


def check_place(priority: Any, cache_salt: str) -> None:
    """RequestError for a priority or a salt that is out of range."""
    if type(priority) is not int:
        raise RequestError(f"priority must be an integer, not {priority!r}", field="priority")
    if len(cache_salt) > _MAX_SALT_CHARACTERS:
        raise RequestError(
            f"cache_salt is longer than {_MAX_SALT_CHARACTERS} characters", field="cache_salt"
        )
