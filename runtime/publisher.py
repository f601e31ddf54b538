"""From what steps gave to what the readers of requests are told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from .faults import is_fault, note_fault
from .requests.outputs import FinishReason, RequestOutput
from .requests.request import Request
from .requests.request_stream import NO_FINITE_VALUE, RequestStream
from .sampling.sampler import Sample
from .sampling.token_logprobs import TokenLogprobs
from .scheduling.owners import PlannedStep
from .scheduling.step_results import StepResults

Abort = Callable[[str, FinishReason], list[Request]]
"""Ends all choices of a request that have not ended; those that did now."""


class Publisher:
    """The streams of the requests that were queued and have not ended.

    `abort` is the scheduler's. What fails for one request ends that one, and no other.
    """

    def __init__(self, abort: Abort) -> None:
        self._abort = abort
        self.streams: dict[str, RequestStream] = {}
        self._behind: dict[str, None] = {}  # whose readers had not read when there was news

    def forget(self, request_id: str) -> None:
        """Nothing more is told of a request."""
        self.streams.pop(request_id, None)

    def publish(self, planned: PlannedStep, results: StepResults) -> list[RequestOutput]:
        """What a step that was settled has to tell."""
        outputs = []
        for request, entries in results.prompts:
            if output := self._tell_prompt(request, entries, results.faults):
                outputs.append(output)
        several: dict[str, list[tuple[Request, Sample | None]]] = {}
        for request, sample in zip(planned.owners.sampled, results.samples, strict=True):
            request_id = request.request_id
            stream = self.streams.get(request_id)
            # It ended while the step was in flight, or a row of its prompt has just ended it.
            if sample is None or stream is None:
                continue
            try:
                if stream.keep(sample):
                    if not stream.tells_at_end:
                        self._behind[request_id] = None
                    continue
                if len(stream.choices) > 1:
                    several.setdefault(request_id, []).append((request, sample))
                    continue
            except BaseException as error:
                outputs.append(self._fail(request_id, stream, error))
                continue
            if output := self._tell(request_id, stream, ((request, sample),)):
                outputs.append(output)
        for request_id, samples in several.items():
            if (stream := self.streams.get(request_id)) is None:  # another of its choices failed
                continue
            if output := self._tell(request_id, stream, samples):
                outputs.append(output)
        if self._behind:
            outputs += self._tell_behind()
        return outputs

    def end(self, request_id: str, reason: FinishReason) -> RequestOutput | None:
        """End all that is left of a request; its last output, None where nothing is."""
        ended = self._abort(request_id, reason)
        if not ended:
            return None
        samples = [(choice, None) for choice in ended]
        return self._tell(request_id, self.streams[request_id], samples)

    def _tell_behind(self) -> list[RequestOutput]:
        """What was held back of those whose readers read again, in the step or not."""
        behind, self._behind = self._behind, {}
        outputs = []
        for request_id in behind:
            if (stream := self.streams.get(request_id)) is None:
                continue
            try:
                has_news = stream.has_news
            except BaseException as error:
                outputs.append(self._fail(request_id, stream, error))
                continue
            if has_news and (output := self._tell(request_id, stream, ())):
                outputs.append(output)
        return outputs

    def _tell_prompt(
        self,
        request: Request,
        entries: Sequence[TokenLogprobs] | None,
        faults: Mapping[str, str],
    ) -> RequestOutput | None:
        """Take in log-probabilities of a prompt; the last output of one that has none."""
        request_id = request.request_id
        if (stream := self.streams.get(request_id)) is None:
            return None
        if entries is not None:
            try:
                stream.add_prompt_logprobs(entries)
            except BaseException as error:
                return self._fail(request_id, stream, error)
            return None
        request.error = faults.get(request_id, NO_FINITE_VALUE)
        return self.end(request_id, "error")

    def _tell(
        self,
        request_id: str,
        stream: RequestStream,
        samples: Sequence[tuple[Request, Sample | None]],
    ) -> RequestOutput | None:
        """What to say of a request now; it is forgotten once that is all.

        Where that fails, be it in its text, so does the request.
        """
        try:
            output = stream.add(samples)
        except BaseException as error:
            return self._fail(request_id, stream, error)
        if stream.finished:
            del self.streams[request_id]
        elif output is None and not stream.tells_at_end:
            self._behind[request_id] = None
        return output

    def _fail(self, request_id: str, stream: RequestStream, error: BaseException) -> RequestOutput:
        """End a request of which nothing more can be told but that.

        Raises the error where it is none of the request, as Ctrl-C.
        """
        stream.finished = True  # it may be in the middle of a token
        if not is_fault(error):
            raise error
        self._abort(request_id, "error")
        del self.streams[request_id]
        return stream.failure(note_fault("the output of a request", error))


def rest_of(stream: RequestStream) -> RequestOutput | None:
    """What was kept of a request whose step failed; None also where finding its text fails."""
    try:
        return stream.untold()
    except BaseException as error:
        if not is_fault(error):
            raise
        note_fault("the rest of a request", error)
        return None
