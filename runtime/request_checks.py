"""What the engine asks of a request before it queues it; each refusal names its field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..ir.errors import RequestError
from .sampling_params import SamplingParams

_MAX_SALT_CHARACTERS = 256


def checked_ids(token_ids: Sequence[int], vocab_size: int) -> list[int]:
    """Token ids as a list; RequestError for what is none of this vocabulary."""
    if isinstance(token_ids, bytes) or not isinstance(token_ids, Sequence):
        raise RequestError("the prompt must be text or token ids", field="prompt")
    ids = list(token_ids)
    if not all(type(token) is int and 0 <= token < vocab_size for token in ids):
        wrong = next(t for t in ids if type(t) is not int or not 0 <= t < vocab_size)
        raise RequestError(
            f"{wrong!r} is no token id, they are 0..{vocab_size - 1}", field="prompt"
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
        for token in tokens:
            if token >= vocab_size:
                raise RequestError(
                    f"{field}: {token} is no token id, they are 0..{vocab_size - 1}", field=field
                )
    if params.stop_strings and not has_tokenizer:
        raise RequestError("this model has no tokenizer", field="stop", hint="use stop_token_ids")


def check_place(priority: Any, cache_salt: str) -> None:
    """RequestError for a priority or a salt that is out of range."""
    if type(priority) is not int:
        raise RequestError(f"priority must be an integer, not {priority!r}", field="priority")
    if len(cache_salt) > _MAX_SALT_CHARACTERS:
        raise RequestError(
            f"cache_salt is longer than {_MAX_SALT_CHARACTERS} characters", field="cache_salt"
        )
