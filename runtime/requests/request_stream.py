"""What a request has given: its completions, their text, the best of them, and its prompt."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..sampling.logits_adjuster import ConstraintError
from ..sampling.sampler import Sample
from ..sampling.token_logprobs import TokenLogprobs
from ..text.detokenizer import Detokenizer
from ..text.tokenizer import Tokenizer
from .outputs import CompletionOutput, RequestMetrics, RequestOutput
from .request import Request, RequestState
from .resumption import ChoiceProgress, Resumption, check_ends, refusal_of

NO_FINITE_VALUE = "the logits hold no finite value"
NO_FINITE_STATE = "the hidden states are not finite"
NO_ALLOWED_TOKEN = "no token that is allowed has a finite logit"

Finish = Callable[[Request], None]
"""Ends a choice whose text holds a stop string."""


_MANY = 64  # tokens whose text is found at once


class _Choice:
    """One completion on its way: what has been told of it, and what is still to be told."""

    __slots__ = (
        "_begins",
        "_detokenizer",
        "_logprob",
        "_logprobs",
        "_num_decoded",
        "_num_given",
        "_offsets",
        "_texts",
        "_token_ids",
        "has_ended",
        "has_news",
        "is_over",
        "request",
    )

    def __init__(self, request: Request, detokenizer: Detokenizer | None) -> None:
        self.request = request
        self._detokenizer = detokenizer
        self._logprob = 0.0
        self._begins: tuple[int, ...] = ()  # of tokens, where that is not certain yet
        self._num_given = 0  # characters of text, if it is told where tokens begin
        self.has_ended = False
        self.has_news = False
        """Whether there is anything to tell."""
        self.is_over = False
        """Whether its end has been told."""
        self._forget_news()

    def resume(self, told: ChoiceProgress) -> None:
        """Be where a choice was of which so much was told, elsewhere.

        Its text is found again, so that what is held back, of a character or of a stop string, is
        what was held back there. RequestError where these tokens gave another text, or ended it.
        """
        request, detokenizer = self.request, self._detokenizer
        check_ends(request.choice, told, request.end_token_ids)
        # The last token of one that has ended may be no text, or complete its stop string.
        going_on = told.token_ids[:-1] if told.has_ended else told.token_ids
        for token in going_on:
            if detokenizer is None:
                break
            begin = detokenizer.num_characters
            self._settled((begin,), detokenizer.push(token))
            if detokenizer.matched_stop is not None:
                ended = f"the stop string {detokenizer.matched_stop!r:.80} ended it"
                raise refusal_of(request.choice, ended)
        if told.has_ended:
            request.finish_reason, request.stop_reason = told.finish_reason, told.stop_reason
            request.state = RequestState.FINISHED
            self.has_ended = self.is_over = True
        elif self._num_given != told.num_characters:
            counts = f"{self._num_given} characters of text, and {told.num_characters} were told"
            raise refusal_of(request.choice, f"its tokens have {counts}")
        self._logprob = told.cumulative_logprob or 0.0

    def _forget_news(self) -> None:
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._num_decoded = 0  # of these, those whose text has been found
        self._logprobs: list[TokenLogprobs] = []
        self._offsets: list[int] = []

    @property
    def is_plain(self) -> bool:
        """Whether it is tokens and their text alone, and no text ends it."""
        params = self.request.params
        return self.request.num_logprobs is None and not params.stop_strings

    def keep(self, token: int) -> bool:
        """Take in a token of one that is plain, and leave its text for later; whether it did."""
        token_ids = self._token_ids
        if self.request.finish_reason is not None or len(token_ids) - self._num_decoded >= _MANY:
            return False
        token_ids.append(token)
        self.has_news = True
        return True

    def add(self, sample: Sample | None, finish: Finish) -> None:
        """Take in a token; without one, the end."""
        self._catch_up()
        request = self.request
        token = added = None
        if sample is not None and (token := sample.token_id) is None:
            unnamed = NO_FINITE_VALUE if request.adjuster is None else NO_ALLOWED_TOKEN
            request.error = sample.error or unnamed
            if request.pool is not None:
                request.error = NO_FINITE_STATE
        elif token is not None and request.num_output_tokens:
            added = token
        text, begin = "", 0
        if (detokenizer := self._detokenizer) is not None:
            begin = detokenizer.num_characters
            text = self._text(detokenizer, added, finish)
        if request.params.logprobs is not None:
            self._offsets += self._settled(() if added is None else (begin,), text)
        if text:
            self._texts.append(text)
        if added is not None:
            self._token_ids.append(added)
            self._num_decoded += 1
            if sample is not None and sample.logprobs is not None:
                self._logprob += sample.logprobs.logprob
                self._logprobs.append(sample.logprobs)
        self.has_ended = request.finish_reason is not None
        self.has_news = True

    def news(self) -> CompletionOutput:
        """What was added and has not been told."""
        self._catch_up()
        request, logprobs, offsets = self.request, None, None
        if request.params.logprobs is not None:
            logprobs, offsets = tuple(self._logprobs) or None, tuple(self._offsets)
        return CompletionOutput(
            index=request.choice,
            text="".join(self._texts),
            token_ids=tuple(self._token_ids),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            logprobs=logprobs,
            cumulative_logprob=None if request.num_logprobs is None else self._logprob,
            text_offsets=offsets,
        )

    def told(self) -> None:
        """Its news have been told."""
        if self.has_news:
            self._forget_news()
            self.has_news, self.is_over = False, self.has_ended

    def untold(self) -> CompletionOutput:
        """Its news, where the step after them failed: an end only if that was before."""
        news = self.news()
        return news if self.has_ended else replace(news, finish_reason=None, stop_reason=None)

    def failure(self) -> CompletionOutput:
        """The last of it, where its request fails: as it ended, if it had, else with an error."""
        try:
            del self._token_ids[self._num_decoded :]
            news = self.news()
        except Exception:  # what failed may be this very piece
            return _failure(self.request)
        return news if self.has_ended else replace(news, finish_reason="error", stop_reason=None)

    def _catch_up(self) -> None:
        """Find the text of tokens that were kept."""
        token_ids, detokenizer = self._token_ids, self._detokenizer
        while self._num_decoded < len(token_ids):
            text = "" if detokenizer is None else detokenizer.push(token_ids[self._num_decoded])
            self._num_decoded += 1
            if text:
                self._texts.append(text)

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

    def _text(self, detokenizer: Detokenizer, token: int | None, finish: Finish) -> str:
        """The text that is certain now. A stop string ends the choice here."""
        request, text = self.request, ""
        if token is not None and request.stop_reason is None:  # one that ends it is no text
            text = detokenizer.push(token)
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
    """Tells what steps added to a request, beside the scheduler that runs it.

    What a step added is told at once if it `is_wanted`, which it always is unless who reads is
    behind. Else it is joined to what the next ones add. `whole` is for who waits for the end: they
    are told of the first step, and then of all others together.
    """

    def __init__(
        self,
        request: Request,
        prompt: str | None,
        tokenizer: Tokenizer | None,
        finish: Finish,
        *,
        whole: bool = False,
    ) -> None:
        self.request = request
        first = _detokenizer(request, tokenizer)
        self.choices = [_Choice(request, first)]
        for each in request.unforked:
            self.choices.append(_Choice(each, None if first is None else first.fork()))
        self._num_unfinished = len(self.choices)
        self.finished = False
        """Whether every choice has ended."""
        self._finish = finish
        self._prompt = prompt
        self._prompt_token_ids = tuple(request.token_ids)
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None
        if request.params.prompt_logprobs is not None:
            self._prompt_logprobs = [None] * (1 + request.num_prompt_rows)
        self._holds_back = request.params.num_choices > request.params.n
        self._keeps = (
            len(self.choices) == 1 and self.choices[0].is_plain and not request.is_read_only
        )
        self._whole = whole
        self.tells_at_end = self._holds_back
        """Whether nothing is told before the end."""
        self.is_wanted = not self._holds_back
        self._telling: Sequence[_Choice] = ()
        """Whose news are being forgotten, as they have been told."""

    def resume(self, resumed: Resumption) -> list[Request]:
        """Go on behind what was told of the request elsewhere; the choices that have not ended.

        Before it is queued. RequestError for what this request cannot have told.
        """
        going_on: list[Request] = []
        for choice, told in zip(self.choices, resumed.choices, strict=True):
            choice.resume(told)
            if told.has_ended:
                self._num_unfinished -= 1
                continue
            try:
                choice.request.resume(told.token_ids, resumed.seed)
            except ConstraintError as error:
                raise refusal_of(choice.request.choice, str(error)) from error
            choice.request.is_lead = not going_on
            going_on.append(choice.request)
        self.request, self._prompt_logprobs = going_on[0], None
        return going_on

    def want(self) -> None:
        """Whoever reads has read everything; on any thread."""
        if not self.tells_at_end:
            self.is_wanted = True

    @property
    def has_news(self) -> bool:
        """Whether there is anything to tell."""
        return any(choice.has_news for choice in self.choices)

    def add_prompt_logprobs(self, entries: Sequence[TokenLogprobs]) -> None:
        """Take in log-probabilities of the next tokens of the prompt."""
        assert self._prompt_logprobs is not None
        self._prompt_logprobs.extend(entries)

    def keep(self, sample: Sample) -> bool:
        """Take in the sample of an only choice, where nothing of it is told now; whether it did."""
        if self.is_wanted or not self._keeps or sample.token_id is None:
            return False
        return self.choices[0].keep(sample.token_id)

    def add(self, samples: Sequence[tuple[Request, Sample | None]]) -> RequestOutput | None:
        """Take in samples of a step, or the end of choices; what is told now, None for nothing."""
        for request, sample in samples:
            choice = self.choices[request.choice]
            choice.add(sample, self._finish)
            if choice.has_ended:
                self._num_unfinished -= 1
        self.finished = self._num_unfinished == 0
        return self.tell() if self.is_wanted or self.finished else None

    def tell(self) -> RequestOutput:
        """Everything that was added since the last time, of which there is something."""
        telling = [choice for choice in self.choices if choice.has_news]
        pieces = self._best() if self._holds_back else [choice.news() for choice in telling]
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
            metrics=self._metrics(self.finished),
            finished=self.finished,
            prompt_logprobs=prompt_logprobs if self.request.pool is None else None,
            embedding=None if pool is None else pool.vector,
            error=self._error(pieces),
            seed=self._seed,
        )
        if self._whole:
            self.tells_at_end, self.is_wanted = True, False
        self._telling = telling  # from here on, what fails loses the output
        for choice in telling:
            choice.told()
        self._telling = ()
        return output

    def failure(self, error: str) -> RequestOutput:
        """The last output of a request that fails here: every choice that had not ended has.

        So has one whose last news were lost. Of those held back until the best are known, the
        first `n` have.
        """
        if self._holds_back:
            first = range(self.request.params.n)
            pieces = [CompletionOutput(index=index, finish_reason="error") for index in first]
        else:
            pieces = [
                _failure(choice.request) if choice in self._telling else choice.failure()
                for choice in self.choices
                if choice in self._telling or not choice.is_over
            ]
        self.finished = True
        return self._output(pieces, error)

    def untold(self) -> RequestOutput | None:
        """What was kept while who reads was behind; None for nothing, and for whole answers.

        For a request whose step failed, of which nothing else is told but an error.
        """
        if self.finished or self.tells_at_end or not self.has_news:
            return None
        output = self._output([choice.untold() for choice in self.choices if choice.has_news])
        for choice in self.choices:
            choice.told()
        return output

    def _output(
        self, pieces: Sequence[CompletionOutput], error: str | None = None
    ) -> RequestOutput:
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=tuple(pieces),
            metrics=self._metrics(self.finished),
            finished=self.finished,
            error=error,
            seed=self._seed,
        )

    @property
    def _seed(self) -> int | None:
        return None if self.request.is_read_only else self.request.seed

    def _error(self, pieces: Sequence[CompletionOutput]) -> str | None:
        """What the first choice that failed died of, where one of `pieces` did."""
        for piece in pieces:
            if piece.finish_reason == "error":
                errors = (choice.request.error for choice in self.choices)
                return next((error for error in errors if error is not None), None)
        return None

    def _best(self) -> list[CompletionOutput]:
        """The `n` completions of the greatest mean log-probability, the best first.

        Those that failed come last; the lower index first among equals.
        """
        whole = [choice.news() for choice in self.choices]
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
    """A request that was checked and built, and waits to be queued.

    Of one that is resumed, `request` is the first choice that has not ended, and `others` are the
    others.
    """

    request: Request
    stream: RequestStream
    others: tuple[Request, ...] = ()


def _failure(choice: Request) -> CompletionOutput:
    """The end of a choice of which nothing is left to tell."""
    return CompletionOutput(index=choice.choice, finish_reason="error")


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
