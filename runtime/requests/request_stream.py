"""What a request has given: its completions, their text, the best of them, and its prompt."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..sampling.sampler import Sample
from ..sampling.token_logprobs import TokenLogprobs
from ..text.detokenizer import Detokenizer
from ..text.tokenizer import Tokenizer
from .outputs import (
    CompletionOutput,
    RequestMetrics,
    RequestOutput,
    merge_completions,
)
from .request import Request

NO_FINITE_VALUE = "the logits hold no finite value"
NO_FINITE_STATE = "the hidden states are not finite"
NO_ALLOWED_TOKEN = "no token that is allowed has a finite logit"

Finish = Callable[[Request], None]
"""Ends a choice whose text holds a stop string."""


class _Choice:
    """One completion on its way."""

    __slots__ = (
        "_begins",
        "_detokenizer",
        "_logprob",
        "_num_given",
        "is_over",
        "pieces",
        "request",
    )

    def __init__(self, request: Request, detokenizer: Detokenizer | None) -> None:
        self.request = request
        self._detokenizer = detokenizer
        self._logprob = 0.0
        self._begins: tuple[int, ...] = ()  # of tokens, where that is not certain yet
        self._num_given = 0  # characters of text
        self.is_over = False  # and whoever waits for it has been told
        self.pieces: list[CompletionOutput] = []  # held back until the best are known

    def add(self, sample: Sample | None, finish: Finish) -> CompletionOutput:
        """What a token added; without one, the end."""
        request = self.request
        tokens: tuple[int, ...] = ()
        logprobs: tuple[TokenLogprobs, ...] | None = None
        if sample is not None and (token := sample.token_id) is None:
            unnamed = NO_FINITE_VALUE if request.adjuster is None else NO_ALLOWED_TOKEN
            request.error = sample.error or unnamed
            if request.pool is not None:
                request.error = NO_FINITE_STATE
        elif sample is not None and token is not None and request.num_output_tokens:
            tokens = (token,)
            if sample.logprobs is not None:
                self._logprob += sample.logprobs.logprob
                logprobs = (sample.logprobs,)
        text, begin = "", 0
        if self._detokenizer is not None:
            begin = self._detokenizer.num_characters
            text = self._text(self._detokenizer, tokens, finish)
        offsets = None
        if request.params.logprobs is not None:
            offsets = self._settled((begin,) * len(tokens), text)
        return CompletionOutput(
            index=request.choice,
            text=text,
            token_ids=tokens,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            logprobs=None if request.params.logprobs is None else logprobs,
            cumulative_logprob=None if request.num_logprobs is None else self._logprob,
            text_offsets=offsets,
        )

    def _settled(self, begins: tuple[int, ...], text: str) -> tuple[int, ...]:
        """Where tokens begin, as far as that is certain now that `text` has been added.

        One whose text is held back may still turn out to lie behind the end, in a stop string.
        """
        self._num_given += len(text)
        begins = self._begins + begins
        if self.request.finish_reason is not None:
            self._begins = ()
            return tuple(min(begin, self._num_given) for begin in begins)
        count = bisect_right(begins, self._num_given)
        self._begins = begins[count:]
        return begins[:count]

    def _text(self, detokenizer: Detokenizer, tokens: tuple[int, ...], finish: Finish) -> str:
        """The text that is certain now. A stop string ends the choice here."""
        request, text = self.request, ""
        if tokens and request.stop_reason is None:  # a token that ends it is no text
            text = detokenizer.push(tokens[0])
        if request.finish_reason is not None:
            text += detokenizer.flush()
        if detokenizer.matched_stop is not None:
            if request.finish_reason is None:
                finish(request)
            if request.finish_reason == "length":
                request.finish_reason = "stop"
            request.stop_reason = detokenizer.matched_stop
        return text


class RequestStream:
    """Tells what each step added to a request, beside the scheduler that runs it."""

    def __init__(
        self, request: Request, prompt: str | None, tokenizer: Tokenizer | None, finish: Finish
    ) -> None:
        self.request = request
        first = _detokenizer(request, tokenizer)
        self.choices = [_Choice(request, first)]
        for each in request.unforked:
            self.choices.append(_Choice(each, None if first is None else first.fork()))
        self._num_unfinished = len(self.choices)
        self.finished = False
        """Whether every choice has ended, and that has been told."""
        self._finish = finish
        self._prompt = prompt
        self._prompt_token_ids = tuple(request.token_ids)
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None
        if request.params.prompt_logprobs is not None:
            self._prompt_logprobs = [None] * (1 + request.num_prompt_rows)
        self._holds_back = request.params.num_choices > request.params.n

    def add_prompt_logprobs(self, entries: Sequence[TokenLogprobs]) -> None:
        """Take in log-probabilities of the next tokens of the prompt."""
        assert self._prompt_logprobs is not None
        self._prompt_logprobs.extend(entries)

    def add(self, samples: Sequence[tuple[Request, Sample | None]]) -> RequestOutput | None:
        """What the samples of a step, or the end of choices, have to tell; None for nothing yet."""
        pieces, ended = [], False
        for request, sample in samples:
            piece = self.choices[request.choice].add(sample, self._finish)
            pieces.append(piece)
            if piece.finish_reason is not None:
                self._num_unfinished -= 1
                ended = True
        self.finished = finished = self._num_unfinished == 0
        if self._holds_back:
            for piece in pieces:
                self.choices[piece.index].pieces.append(piece)
            if not finished:
                return None
            pieces = self._best()
        elif len(pieces) > 1:
            pieces.sort(key=lambda piece: piece.index)
        prompt_logprobs = None
        if self._prompt_logprobs is not None:
            prompt_logprobs, self._prompt_logprobs = tuple(self._prompt_logprobs), None
        # One that was aborted may have seen some of its rows, or none.
        pool = self.request.pool if self.request.finish_reason == "length" else None
        output = RequestOutput(
            request_id=self.request.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=tuple(pieces),
            metrics=self._metrics(finished),
            finished=finished,
            prompt_logprobs=prompt_logprobs if self.request.pool is None else None,
            embedding=None if pool is None else pool.vector,
            error=self._error(pieces) if ended else None,
        )
        if ended and not finished:
            for piece in pieces:
                self.choices[piece.index].is_over = piece.finish_reason is not None
        return output

    def failure(self, error: str) -> RequestOutput:
        """The last output of a request that fails here: every choice that had not ended has.

        Of those held back until the best are known, the first `n` have.
        """
        open_choices = [choice for choice in self.choices if not choice.is_over]
        if self._holds_back:
            open_choices = self.choices[: self.request.params.n]
        self.finished = True
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=tuple(
                CompletionOutput(index=choice.request.choice, finish_reason="error")
                for choice in open_choices
            ),
            metrics=self._metrics(True),
            finished=True,
            error=error,
        )

    def _error(self, pieces: Sequence[CompletionOutput]) -> str | None:
        """What the first choice that failed died of, where one of `pieces` did."""
        if all(piece.finish_reason != "error" for piece in pieces):
            return None
        return next((c.request.error for c in self.choices if c.request.error is not None), None)

    def _best(self) -> list[CompletionOutput]:
        """The `n` completions of the greatest mean log-probability, the best first.

        Those that failed come last; the lower index first among equals.
        """
        whole = [merge_completions(choice.pieces) for choice in self.choices if choice.pieces]
        whole.sort(key=lambda one: (one.finish_reason == "error", -_mean_logprob(one), one.index))
        best = whole[: self.request.params.n]
        return [replace(one, index=index) for index, one in enumerate(best)]

    def _metrics(self, finished: bool) -> RequestMetrics:
        metrics = self.request.metrics()
        if len(self.choices) == 1:
            return metrics
        requests = [choice.request for choice in self.choices]
        ends = [r.finished_time for r in requests if r.finished_time is not None]
        tokens = [r.last_token_time for r in requests if r.last_token_time is not None]
        return replace(
            metrics,
            last_token_time=max(tokens, default=None),
            finished_time=max(ends) if finished else None,
            num_preemptions=sum(r.num_preemptions for r in requests),
        )


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that was checked and built, and waits to be queued."""

    request: Request
    stream: RequestStream


def _mean_logprob(completion: CompletionOutput) -> float:
    count = len(completion.token_ids)
    return (completion.cumulative_logprob or 0.0) / count if count else float("-inf")


def _detokenizer(request: Request, tokenizer: Tokenizer | None) -> Detokenizer | None:
    if tokenizer is None:
        return None
    params = request.params
    decoder = tokenizer.stream_decoder(
        skip_special_tokens=params.skip_special_tokens, context=request.token_ids
    )
    return Detokenizer(decoder, params.stop_strings, params.min_tokens)
