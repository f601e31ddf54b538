"""How the tokens of one request are chosen, and when it ends; checked when it is made."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...ir.errors import RequestError
from .params_checks import (
    check_bool,
    check_int,
    check_number,
    checked_bias,
    checked_strings,
    checked_token_ids,
)

RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What a checkpoint's generation_config.json may set, by the names it has there."""

MAX_LOGPROBS = 20
MAX_CHOICES = 128
_MAX_INT = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling options and stop conditions. Raises RequestError for values out of range.

    The options are applied to a row of logits in this order:

    1. `logit_bias` {token id: -100..100} is added.
    2. `repetition_penalty` (0.01..100) divides positive logits, and multiplies negative ones, of
       every token in the prompt or the output (Keskar et al. 2019, as in transformers).
    3. `frequency_penalty` times the number of occurrences, and `presence_penalty` once, are
       subtracted for every token in the output (-2..2, as in the OpenAI API).
    4. Masks: tokens that are not in `allowed_token_ids`, tokens in `banned_token_ids`, and, while
       the output is shorter than `min_tokens`, the tokens that would end it (end-of-text and
       `stop_token_ids`). The constraint of the caller comes last.
    5. With `temperature` 0 the largest logit wins, and the step below does not apply. Otherwise
       the logits are divided by it.
    6. `top_k` (0 keeps all tokens), then `top_p` over the remaining ones, then `min_p`, which
       keeps tokens with at least this fraction of the probability of the most likely token.

    Among equal logits, the lowest id wins. Without a `seed`, a random one is chosen when the
    request arrives. The random number for a token depends only on seed, choice and position.

    The request returns `n` completions. With a larger `best_of`, these are the `n` completions
    with the highest mean log-probability per token. `logprobs` = k returns the log-probabilities
    of each token and of the k most likely tokens, and `prompt_logprobs` = k the same for the
    tokens of the prompt. Both are computed from the raw logits, before any of the steps above.

    If `max_tokens` is None, generation continues to the end of the context. 0 is only allowed
    with `prompt_logprobs`, and generates nothing. `stop` strings are detected after `min_tokens`
    tokens. A stop string that is a special token has the same effect as its id in
    `stop_token_ids`, since special tokens produce no text.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] = ()
    allowed_token_ids: Sequence[int] | None = None
    banned_token_ids: Sequence[int] = ()
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    best_of: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_lengths()
        self._check_choices()
        check_bool("ignore_eos", self.ignore_eos)
        check_bool("skip_special_tokens", self.skip_special_tokens)
        for field in ("logprobs", "prompt_logprobs"):
            if getattr(self, field) is not None:
                check_int(field, getattr(self, field), 0, MAX_LOGPROBS)
        if self.seed is not None:
            check_int("seed", self.seed, -(2**63), 2**64 - 1)
        self._freeze_lists()

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings; `stop` itself was made a tuple by the check."""
        return tuple(self.stop)

    @property
    def bias_pairs(self) -> tuple[tuple[int, float], ...]:
        """`logit_bias` as pairs by ascending id, which the check made of it."""
        return tuple(self.logit_bias)  # type: ignore[arg-type]

    @property
    def num_choices(self) -> int:
        """Completions that are generated: `best_of`, or `n`."""
        return self.n if self.best_of is None else self.best_of

    @property
    def token_fields(self) -> dict[str, tuple[int, ...]]:
        """Every field that holds token ids, and the ids."""
        return {
            "logit_bias": tuple(token for token, _ in self.bias_pairs),
            "allowed_token_ids": tuple(self.allowed_token_ids or ()),
            "banned_token_ids": tuple(self.banned_token_ids),
            "stop_token_ids": tuple(self.stop_token_ids),
        }

    def _check_numbers(self) -> None:
        check_number("temperature", self.temperature, 0.0, 100.0)
        check_number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise RequestError("top_p is 0, which keeps no token", field="top_p")
        check_int("top_k", self.top_k, 0, _MAX_INT)
        check_number("min_p", self.min_p, 0.0, 1.0)
        check_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)

    def _check_lengths(self) -> None:
        if self.max_tokens is not None:
            check_int("max_tokens", self.max_tokens, 0, _MAX_INT)
            if self.max_tokens == 0 and self.prompt_logprobs is None:
                raise RequestError(
                    "max_tokens is 0, so nothing would be generated",
                    field="max_tokens",
                    hint="give at least 1, or ask for prompt_logprobs",
                )
        check_int("min_tokens", self.min_tokens, 0, _MAX_INT)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, more than max_tokens ({self.max_tokens})",
                field="min_tokens",
            )

    def _check_choices(self) -> None:
        check_int("n", self.n, 1, MAX_CHOICES)
        if self.best_of is not None:
            check_int("best_of", self.best_of, 1, MAX_CHOICES)
            if self.best_of < self.n:
                raise RequestError(
                    f"best_of is {self.best_of}, less than n ({self.n})", field="best_of"
                )

    def _freeze_lists(self) -> None:
        object.__setattr__(self, "stop", checked_strings("stop", self.stop))
        for field in ("stop_token_ids", "banned_token_ids"):
            object.__setattr__(self, field, checked_token_ids(field, getattr(self, field)))
        bias = checked_bias("logit_bias", self.logit_bias, -100.0, 100.0)
        object.__setattr__(self, "logit_bias", bias)
        if self.allowed_token_ids is None:
            return
        allowed = checked_token_ids("allowed_token_ids", self.allowed_token_ids)
        if not set(allowed) - set(self.banned_token_ids):
            raise RequestError(
                "allowed_token_ids leaves no token to sample",
                field="allowed_token_ids",
                hint="remove it to allow all tokens, or allow one that is not banned",
            )
        object.__setattr__(self, "allowed_token_ids", allowed)


_NEUTRAL = {
    "diversity_penalty": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "guidance_scale": 1,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
}
"""What is not built, by its name in generation_config.json, and the value that changes nothing."""

_NEUTRAL_SAMPLING = {"typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0, "top_h": 1}
"""As above, where the checkpoint samples."""

_ALSO_GREEDY = ("repetition_penalty",)
"""What is recommended also by a checkpoint that does not sample."""

_LISTS = ("bad_words_ids", "sequence_bias", "stop_strings", "suppress_tokens")
"""What becomes lists of a request; `_recommended_lists` says which."""

_WITHOUT_EFFECT = frozenset(
    {
        *("do_sample", "early_stopping", "length_penalty", "num_beam_groups"),  # of beams
        *("assistant_confidence_threshold", "assistant_lookbehind", "is_assistant"),
        *("max_matching_ngram_size", "num_assistant_tokens", "num_assistant_tokens_schedule"),
        *("prompt_lookup_num_tokens", "target_lookbehind"),  # what is drafted, not what is chosen
        *("cache_config", "cache_implementation", "compile_config", "continuous_batching_config"),
        *("disable_compile", "low_memory", "prefill_chunk_size", "return_legacy_cache"),
        *("use_cache", "output_attentions", "output_hidden_states", "output_logits"),
        *(
            "output_scores",
            "return_dict_in_generate",
            "renormalize_logits",
            "remove_invalid_values",
        ),
    }
)
"""What changes how transformers works and not what a model answers."""


def recommended_sampling(generation: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields that a checkpoint's generation_config.json recommends.

    Those that only matter for sampling are left out where it does not sample, as is what no
    request may ask for.
    """
    if not generation:
        return {}
    names = RECOMMENDED if generation.get("do_sample", False) else _ALSO_GREEDY
    numbers = {name: generation[name] for name in names if name in generation}
    fields = {**numbers, **_recommended_lists(generation)}
    return {name: value for name, value in fields.items() if _is_valid(name, value)}


def ignored_recommendations(generation: Mapping[str, Any] | None) -> dict[str, Any]:
    """What generation_config.json recommends, would change something, and is not built."""
    generation = generation or {}
    sampled = generation.get("do_sample", False)
    neutral = _NEUTRAL | (_NEUTRAL_SAMPLING if sampled else {})
    idle = {*_WITHOUT_EFFECT, *_NEUTRAL, *_NEUTRAL_SAMPLING, *RECOMMENDED, *_LISTS}
    ignored = {
        name: value for name, value in generation.items() if name not in idle and value not in _OFF
    }
    for name, nothing in neutral.items():
        if generation.get(name, nothing) != nothing:
            ignored[name] = generation[name]
    for name in RECOMMENDED if sampled else _ALSO_GREEDY:
        if name in generation and not _is_valid(name, generation[name]):
            ignored[name] = generation[name]
    return dict(sorted({**ignored, **_ignored_lists(generation)}.items()))


def notes_on_ignored(generation: Mapping[str, Any] | None) -> list[str]:
    """A line for each of `ignored_recommendations`."""
    return [
        f"the checkpoint recommends {name} {_shown(value)}: not supported, ignored"
        for name, value in ignored_recommendations(generation).items()
    ]


_OFF: tuple[Any, ...] = (None, False, 0, "", [], {})


def _recommended_lists(generation: Mapping[str, Any]) -> dict[str, Any]:
    """Lists of token ids and texts as fields: what concerns several tokens at once is left out."""
    words = [*_entries(generation, "bad_words_ids"), *_suppressed(generation)]
    biases = [one for one in _entries(generation, "sequence_bias") if _is_biased_token(one)]
    fields = {
        "banned_token_ids": sorted({one[0] for one in words if _is_one(one)}),
        "logit_bias": sorted({one[0][0]: one[1] for one in biases}.items()),
        "stop": _stop_strings(generation),
    }
    return {name: value for name, value in fields.items() if value}


def _ignored_lists(generation: Mapping[str, Any]) -> dict[str, Any]:
    """What of those lists no field can say."""
    words, biases = _entries(generation, "bad_words_ids"), _entries(generation, "sequence_bias")
    stops = _stop_strings(generation)
    lists: dict[str, Any] = {
        "bad_words_ids": [one for one in words if not _is_one(one)],
        "sequence_bias": [one for one in biases if not _is_biased_token(one)],
        "stop_strings": [] if _is_valid("stop", stops) else stops,
        "suppress_tokens": [one[0] for one in _suppressed(generation) if not _is_one(one)],
    }
    for name in _LISTS:
        kinds = (list, str) if name == "stop_strings" else list
        if not isinstance(generation.get(name), kinds):
            lists[name] = generation.get(name)
    return {name: value for name, value in lists.items() if value}


def _entries(generation: Mapping[str, Any], name: str) -> list[Any]:
    value = generation.get(name)
    return value if isinstance(value, list) else []


def _suppressed(generation: Mapping[str, Any]) -> list[list[Any]]:
    return [[one] for one in _entries(generation, "suppress_tokens")]


def _stop_strings(generation: Mapping[str, Any]) -> list[Any]:
    value = generation.get("stop_strings")
    return [value] if isinstance(value, str) else _entries(generation, "stop_strings")


def _is_one(ids: Any) -> bool:
    return isinstance(ids, list) and len(ids) == 1 and _is_valid("banned_token_ids", ids)


def _is_biased_token(entry: Any) -> bool:
    """Whether an entry of `sequence_bias`, [[ids], bias], is of one token and within our range."""
    if not isinstance(entry, list) or len(entry) != 2 or not _is_one(entry[0]):
        return False
    return _is_valid("logit_bias", [(entry[0][0], entry[1])])


def _is_valid(name: str, value: Any) -> bool:
    try:
        SamplingParams(**{name: value})
    except RequestError:
        return False
    return True


def _shown(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:g}"
    text = json.dumps(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


_SHOWN = 60
