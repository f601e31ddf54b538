"""How the tokens of one request are chosen, and when it ends; checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..ir.errors import RequestError

RECOMMENDED = ("temperature", "top_p", "top_k")
"""What a checkpoint's generation_config.json may set, by the names it has there."""

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling and stopping of one request. Anything out of range raises `RequestError`.

    `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep every token; `seed` None draws one
    when the request arrives; `max_tokens` None goes on to the end of the context; `logprobs` n
    gives the log-probability of each token and of the n likeliest, from the raw logits.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    n: int = 1
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise RequestError("top_p is 0, which keeps no token", field="top_p")
        _check_int("top_k", self.top_k, 0, 2**31 - 1)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**64 - 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check_int("n", self.n, 1, 2**31 - 1)
        if self.n != 1:
            raise RequestError(
                f"n is {self.n}; only one completion a request is built",
                field="n",
                hint="send the request n times with different seeds",
            )
        _check_bool("ignore_eos", self.ignore_eos)
        _check_bool("skip_special_tokens", self.skip_special_tokens)
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_token_ids(self.stop_token_ids))

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings; `stop` itself was made a tuple by the check."""
        return tuple(self.stop)


_NEUTRAL = {
    "repetition_penalty": 1,
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
}
"""What is not built, by its name in generation_config.json, and the value that changes nothing."""

_NEUTRAL_SAMPLING = {"min_p": 0, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}
"""As above, where the checkpoint samples."""


def recommended_sampling(generation: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields that a checkpoint's generation_config.json recommends, where it samples at all."""
    if not generation or not generation.get("do_sample", False):
        return {}
    return {name: generation[name] for name in RECOMMENDED if name in generation}


def ignored_recommendations(generation: Mapping[str, Any] | None) -> dict[str, Any]:
    """What generation_config.json recommends, would change something, and is not built."""
    generation = generation or {}
    neutral = _NEUTRAL | (_NEUTRAL_SAMPLING if generation.get("do_sample", False) else {})
    return {
        name: generation[name]
        for name, nothing in neutral.items()
        if generation.get(name, nothing) != nothing
    }


def _check_number(field: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RequestError(f"{field} must be a number, not {value!r}", field=field)
    if not low <= value <= high:  # nor does NaN lie between them
        raise RequestError(f"{field} is {value}, outside {low:g}..{high:g}", field=field)


def _check_int(field: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{field} must be an integer, not {value!r}", field=field)
    if not low <= value <= high:
        raise RequestError(f"{field} is {value}, outside {low}..{high}", field=field)


def _check_bool(field: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise RequestError(f"{field} must be true or false, not {value!r}", field=field)


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, (tuple, list)) or not all(isinstance(s, str) for s in strings):
        raise RequestError(f"stop must be a string or strings, not {value!r}", field="stop")
    if "" in strings:
        raise RequestError("stop holds an empty string", field="stop")
    if len(strings) > MAX_STOP_STRINGS:
        raise RequestError(f"stop has {len(strings)} of at most {MAX_STOP_STRINGS}", field="stop")
    if any(len(s) > MAX_STOP_CHARACTERS for s in strings):
        raise RequestError(
            f"a stop string is longer than {MAX_STOP_CHARACTERS} characters", field="stop"
        )
    return tuple(strings)


def _stop_token_ids(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        raise RequestError(
            f"stop_token_ids must be token ids, not {value!r}", field="stop_token_ids"
        )
    for token in value:
        _check_int("stop_token_ids", token, 0, 2**31 - 1)
    return tuple(value)
