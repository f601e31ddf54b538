"""What the front of several engines checks by itself, and the errors that it gives."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...ir.errors import CapacityError, InfcError, RequestError
from ...ir.sizes import format_count
from ..requests.request_checks import checked_ids

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer
    from .replica import Replica


def encode_prompt(
    prompt: str | Sequence[int], tokenizer: Tokenizer | None, vocab_size: int
) -> list[int]:
    """The tokens of a prompt, checked."""
    if not isinstance(prompt, str):
        return checked_ids(prompt, vocab_size)
    if tokenizer is None:
        raise RequestError("this model has no tokenizer", field="prompt", hint="send token ids")
    return checked_ids(tokenizer.encode(prompt), vocab_size)


def text_of(prompt: str | Sequence[int]) -> str | None:
    """The prompt as text, if it is given as such."""
    return prompt if isinstance(prompt, str) else None


def check_room(num_waiting: int, num_new: int, most: int) -> None:
    """Raises CapacityError where more requests would wait than may, the new ones included."""
    if num_waiting + num_new > most:
        raise CapacityError(
            f"{format_count(num_waiting, 'request')} already waiting", hint="try again later"
        )


def of_replica(replica: Replica, error: InfcError) -> InfcError:
    """The error, with the replica as its place."""
    of_it = copy.copy(error)
    of_it.where = f"replica {replica.index}" + (f": {error.where}" if error.where else "")
    return of_it


def stopped(error: InfcError) -> InfcError:
    """What requests end with where no engine is left."""
    return InfcError(f"no engine is left: {error}")
