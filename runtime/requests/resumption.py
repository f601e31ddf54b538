"""What was told of a request that was interrupted: what another engine needs to continue it."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

from ...ir.errors import RequestError
from ..sampling.sampling_params import SamplingParams
from .outputs import FinishReason, RequestOutput

FIELD = "resumed"
_ENDS = tuple(reason for reason in get_args(FinishReason) if reason != "abort")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceProgress:
    """What was told of one choice, in plain values; RequestError for any other.

    `num_characters` of text followed from its tokens: where the engine that continues does not
    find the same number, it has another tokenizer, or the request other parameters.
    `cumulative_logprob` is the sum after its last token, if log-probabilities are told. One that
    has not ended has no `finish_reason`.
    """

    token_ids: tuple[int, ...]
    num_characters: int = 0
    cumulative_logprob: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", _as_tuple("token_ids", self.token_ids))
        if not all(type(token) is int for token in self.token_ids):
            wrong = next(token for token in self.token_ids if type(token) is not int)
            raise _refusal(f"{reprlib.repr(wrong)} is not a token id")
        _check_type("num_characters", self.num_characters, int)
        _check_type("cumulative_logprob", self.cumulative_logprob, float, type(None))
        _check_type("stop_reason", self.stop_reason, str, int, type(None))
        if self.finish_reason is not None and self.finish_reason not in _ENDS:
            shown = reprlib.repr(self.finish_reason)
            raise _refusal(
                f"finish_reason is {shown}, not one of {', '.join(_ENDS)}",
                "a choice that was aborted has not ended: give what was told before that",
            )

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it is left to compute."""
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Resumption:
    """What was told of all choices of a request, by their index, and the seed of its draws.

    With the prompt and the parameters it determines the rest. `as_data` gives it as lists,
    dictionaries, numbers and texts, for JSON or msgpack, and `from_data` reads them.
    """

    seed: int
    choices: tuple[ChoiceProgress, ...]

    def __post_init__(self) -> None:
        _check_type("seed", self.seed, int)
        if not 0 <= self.seed < 2**64:
            raise _refusal(f"seed is {self.seed}, expected 0..2**64-1")
        object.__setattr__(self, "choices", _as_tuple("choices", self.choices))
        for choice in self.choices:
            _check_type("a choice", choice, ChoiceProgress)

    @property
    def num_tokens(self) -> int:
        """Tokens of all choices."""
        return sum(len(choice.token_ids) for choice in self.choices)

    def as_data(self) -> dict[str, Any]:
        """Plain values, which `from_data` reads."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Any) -> Resumption:
        """Reads what `as_data` gave, also after JSON; RequestError for anything else."""
        fields = _fields_of(data, cls)
        choices = _as_tuple("choices", fields["choices"])
        made = tuple(ChoiceProgress(**_fields_of(each, ChoiceProgress)) for each in choices)
        return cls(seed=fields["seed"], choices=made)


class _Told:
    """What was told of one choice so far."""

    __slots__ = ("finish_reason", "logprob", "num_characters", "stop_reason", "token_ids")

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.num_characters = 0
        self.logprob: float | None = None
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None


class Progress:
    """Follows a request by its outputs, of which it keeps tokens and lengths only.

    Take in each output that is passed on, and no other: whoever continues the request begins
    exactly behind the last one. An output that says that the request was aborted, or failed with
    its engine, is the end for who reads it: to continue the request, neither pass it on nor take
    it in.
    """

    __slots__ = ("_choices", "_seed", "finished")

    def __init__(self, outputs: Iterable[RequestOutput] = ()) -> None:
        self._choices: dict[int, _Told] = {}
        self._seed: int | None = None
        self.finished = False
        """Whether the last output was the end."""
        for output in outputs:
            self.add(output)

    @classmethod
    def of(cls, resumed: Resumption) -> Progress:
        """That of a request which is continued, behind what was told elsewhere."""
        progress = cls()
        progress._seed = resumed.seed
        for index, choice in enumerate(resumed.choices):
            told = progress._choices[index] = _Told()
            told.token_ids += choice.token_ids
            told.num_characters, told.logprob = choice.num_characters, choice.cumulative_logprob
            told.finish_reason, told.stop_reason = choice.finish_reason, choice.stop_reason
        return progress

    def add(self, output: RequestOutput) -> None:
        """Take in the next output. RequestError for one that says that the request was aborted."""
        if any(piece.finish_reason == "abort" for piece in output.outputs):
            raise _refusal(
                f"request {output.request_id!r} was aborted, which is no progress",
                "leave this output out, and continue the request behind the one before",
            )
        if output.seed is not None:
            self._seed = output.seed
        self.finished = output.finished
        for piece in output.outputs:
            told = self._choices.get(piece.index)
            if told is None:
                told = self._choices[piece.index] = _Told()
            told.token_ids += piece.token_ids
            told.num_characters += len(piece.text)
            if piece.cumulative_logprob is not None:
                told.logprob = piece.cumulative_logprob
            told.finish_reason, told.stop_reason = piece.finish_reason, piece.stop_reason

    def resumption(self) -> Resumption | None:
        """What continues the request; None as long as nothing was told, so that it begins anew.

        RequestError where it has ended.
        """
        if self.finished:
            raise _refusal("the answer is complete, nothing of it is left to continue")
        if self._seed is None:
            return None
        choices = [
            ChoiceProgress(
                token_ids=tuple(told.token_ids),
                num_characters=told.num_characters,
                cumulative_logprob=told.logprob,
                finish_reason=told.finish_reason,
                stop_reason=told.stop_reason,
            )
            for _, told in sorted(self._choices.items())
        ]
        return Resumption(seed=self._seed, choices=tuple(choices))


def check_resumption(
    resumed: Resumption, params: SamplingParams, *, vocab_size: int, most_tokens: int
) -> None:
    """RequestError for what no request with these parameters can have told.

    `most_tokens` is the length of the longest answer.
    """
    if not isinstance(resumed, Resumption):
        raise _refusal(f"it must be a Resumption, not {type(resumed).__name__}")
    if params.max_tokens == 0:
        raise _refusal("a request without tokens tells nothing before its end")
    if params.num_choices > params.n:
        raise _refusal(
            "a request with best_of tells nothing before its end",
            "begin it anew; with a seed, the answer is the same",
        )
    if len(resumed.choices) != params.n:
        raise _refusal(f"it has {len(resumed.choices)} choices, and the request {params.n}")
    if params.seed is not None and params.seed & (2**64 - 1) != resumed.seed:
        raise _refusal(f"its seed is {resumed.seed}, and that of the request {params.seed}")
    if all(choice.has_ended for choice in resumed.choices):
        raise _refusal("every choice has ended, nothing is left to continue")
    for index, choice in enumerate(resumed.choices):
        reason = _wrong(choice, params, vocab_size, most_tokens)
        if reason is not None:
            raise refusal_of(index, reason)


def refusal_of(index: int, reason: str) -> RequestError:
    """The error for what was told of one choice."""
    return _refusal(f"choice {index}: {reason}")


def check_ends(index: int, told: ChoiceProgress, end_token_ids: Iterable[int]) -> None:
    """RequestError where a token before the last ends an answer, or the last one did."""
    ends, token_ids = frozenset(end_token_ids), told.token_ids
    if ends.isdisjoint(token_ids):
        return
    first = next(place for place, token in enumerate(token_ids) if token in ends)
    if first + 1 < len(token_ids) or told.finish_reason != "stop":
        raise refusal_of(index, f"token {token_ids[first]} at place {first} ended it")


def _wrong(
    choice: ChoiceProgress, params: SamplingParams, vocab_size: int, most_tokens: int
) -> str | None:
    """What is wrong with what was told of a choice."""
    count = len(choice.token_ids)
    for token in choice.token_ids:
        if not 0 <= token < vocab_size:
            return f"{token} is not a token id, expected 0..{vocab_size - 1}"
    if count > most_tokens:
        return f"it has {count} tokens, and may have {most_tokens}"
    if choice.has_ended:
        return None
    if count == most_tokens:
        return f"it has all of the {most_tokens} tokens that it may have, and did not end"
    if not count:
        return "it has no token, but other tokens of the request were told"
    if params.logprobs is not None and choice.cumulative_logprob is None:
        return "it has no cumulative_logprob, and the request asks for log-probabilities"
    return None


def _refusal(message: str, hint: str | None = None) -> RequestError:
    return RequestError(f"the request cannot be resumed: {message}", field=FIELD, hint=hint)


def _check_type(name: str, value: object, *types: type) -> None:
    if type(value) not in types:
        raise _refusal(f"{name} is {reprlib.repr(value)}, not of type {types[0].__name__}")


def _as_tuple(name: str, value: object) -> tuple[Any, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise _refusal(f"{name} is {reprlib.repr(value)}, not a list")
    return tuple(value)


def _fields_of(data: object, kind: type[Resumption | ChoiceProgress]) -> dict[str, Any]:
    """The fields of a dataclass by name, all of them."""
    names = set(kind.__dataclass_fields__)
    if not isinstance(data, Mapping) or set(data) != names:
        raise _refusal(f"{kind.__name__} has the keys {', '.join(sorted(names))}")
    return dict(data)
