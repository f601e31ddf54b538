"""Checks of single sampling parameters; each refusal names its field and the range."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...ir.errors import RequestError

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_TOKEN_LIST = 2**20
_MAX_TOKEN_ID = 2**31 - 1


def check_number(field: str, value: Any, low: float, high: float) -> None:
    """Refuses what is no number within `low..high`; NaN is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(f"{field} must be a number, not {value!r:.80}", field=field)
    if not low <= value <= high:  # nor does NaN lie between them
        raise RequestError(f"{field} is {value}, outside {low:g}..{high:g}", field=field)


def check_int(field: str, value: Any, low: int, high: int) -> None:
    """Refuses what is no integer within `low..high`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{field} must be an integer, not {value!r:.80}", field=field)
    if not low <= value <= high:
        raise RequestError(f"{field} is {value}, outside {low}..{high}", field=field)


def check_bool(field: str, value: Any) -> None:
    """Refuses what is neither True nor False."""
    if not isinstance(value, bool):
        raise RequestError(f"{field} must be true or false, not {value!r:.80}", field=field)


def checked_strings(field: str, value: Any) -> tuple[str, ...]:
    """One string or several, none empty, as a tuple."""
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, (tuple, list)) or not all(isinstance(s, str) for s in strings):
        raise RequestError(f"{field} must be a string or strings, not {value!r:.80}", field=field)
    if "" in strings:
        raise RequestError(f"{field} contains an empty string", field=field)
    if len(strings) > MAX_STOP_STRINGS:
        raise RequestError(
            f"{field} has {len(strings)} strings, the maximum is {MAX_STOP_STRINGS}", field=field
        )
    if any(len(s) > MAX_STOP_CHARACTERS for s in strings):
        raise RequestError(
            f"a {field} string is longer than {MAX_STOP_CHARACTERS} characters", field=field
        )
    return tuple(strings)


def checked_token_ids(field: str, value: Any) -> tuple[int, ...]:
    """Token ids as a tuple; whether the vocabulary has them, the engine says."""
    if not isinstance(value, (tuple, list)):
        raise RequestError(f"{field} must be token ids, not {value!r:.80}", field=field)
    if len(value) > MAX_TOKEN_LIST:
        raise RequestError(
            f"{field} has {len(value)} tokens, the maximum is {MAX_TOKEN_LIST}", field=field
        )
    for token in value:
        check_int(field, token, 0, _MAX_TOKEN_ID)
    return tuple(value)


def checked_bias(field: str, value: Any, low: float, high: float) -> tuple[tuple[int, float], ...]:
    """Pairs (token id, number) by ascending id, from a mapping or from such pairs."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(pairs, (tuple, list)) or not all(
        isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in pairs
    ):
        raise RequestError(f"{field} must map token ids to numbers, not {value!r:.80}", field=field)
    if len(pairs) > MAX_TOKEN_LIST:
        raise RequestError(
            f"{field} has {len(pairs)} tokens, the maximum is {MAX_TOKEN_LIST}", field=field
        )
    for token, bias in pairs:
        if isinstance(token, bool) or not isinstance(token, int):
            problem = f"has the key {token!r:.80}, which is not a token id"
            raise RequestError(f"{field} {problem}", field=field, hint="use integers")
        check_int(field, token, 0, _MAX_TOKEN_ID)
        check_number(field, bias, low, high)
    if len({token for token, _ in pairs}) != len(pairs):
        raise RequestError(f"{field} contains a token id twice", field=field)
    return tuple(sorted((token, float(bias)) for token, bias in pairs))
