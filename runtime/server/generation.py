"""Prompts through the engine: the outputs of a request, counted and checked, as they come."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ...ir.errors import CapacityError, DrainingError, InfcError, RequestError
from ..faults import GivenUpError, is_fault, note_fault
from ..requests.outputs import CompletionOutput, RequestOutput
from .errors import ApiError

if TYPE_CHECKING:
    from ..async_streams import Reader, Sink
    from ..sampling.sampling_params import SamplingParams
    from .request_log import RequestRecord
    from .service import Service
    from .usage import Usage

_LOG = logging.getLogger("infc.server")

Prompt = str | list[int]

_FAILURES = ("abort", "error")  # the other reasons of an end are told as they are


class Outputs:
    """What steps add to each of some prompts; whoever opens it closes it.

    The first prompt that fails ends all of them. What is read is counted in `usage`, and noted in
    `record`.
    """

    def __init__(
        self,
        service: Service,
        reader: Reader,
        request_ids: Sequence[str],
        usage: Usage,
        record: RequestRecord,
    ) -> None:
        self._service = service
        self._reader = reader
        self._request_ids = request_ids
        self._usage = usage
        self._record = record
        self._meters = [service.metrics.meter() for _ in request_ids]
        self._is_late = False
        self._failure: ApiError | None = None  # raised behind what came with it
        seconds = service.settings.request_seconds
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)

    @property
    def num_open(self) -> int:
        """Prompts that have not ended, and one more while an error is to be raised."""
        return self._reader.num_open + (self._failure is not None)

    @property
    def has_more(self) -> bool:
        """Whether `get` need not wait."""
        return self._reader.has_more or self._has_failed

    def divert(self, sink: Sink) -> None:
        """Let `sink` take what arrives while `get` waits: no first output, and no end."""

        def take(number: int, output: RequestOutput) -> bool:
            if self._is_late:
                return False
            usage, is_taken = self._usage, False
            before = usage.completion_tokens
            # First: what was sent and then could not be counted would be sent once more.
            usage.add(number, output)
            try:
                is_taken = sink(number, output)
            finally:
                if not is_taken:
                    usage.completion_tokens = before
            return is_taken

        self._reader.divert(take)

    async def get(self) -> tuple[int, RequestOutput]:
        """The next output, with the number of its prompt; while any is open.

        Raises what the engine raises, and ApiError for an answer that was cut off or took too
        long, or whose step failed. What there was by then is returned before.
        """
        while not self._has_failed:
            number, output = await self._read()
            self._meters[number].add(output)
            self._usage.add(number, output)
            parts = [part for part in output.outputs if self._is_told(part, output)]
            if self._is_late and not output.finished:  # its time was over before the engine knew
                self._service.engine.abort(self._request_ids[number])
            if self._failure is None:
                return number, output
            if parts:
                return number, replace(output, outputs=tuple(map(_without_failure, parts)))
        assert self._failure is not None
        raise self._failure

    @property
    def _has_failed(self) -> bool:
        """Whether nothing is left to return but an error.

        Where the time is over, each prompt has been aborted, and what it gave comes before.
        """
        is_late = self._is_late and self._reader.num_open > 0
        return self._failure is not None and not is_late

    async def _read(self) -> tuple[int, RequestOutput]:
        service = self._service
        try:
            return await self._reader.get()
        except CapacityError as error:
            raise _refusal(service, error) from None
        except InfcError as error:
            if isinstance(error, RequestError) or not service.engine.healthy:
                raise
            _LOG.error("a request failed: %s", error)  # it alone: the engine goes on
            given_up = error if isinstance(error, GivenUpError) else None
            message = given_up.message if given_up else "the step that this answer was in failed"
            raise ApiError(500, message, code="generation_failed") from given_up

    def close(self) -> None:
        """End what has not ended; a second call does nothing."""
        self._timer.cancel()
        self._reader.close()
        for meter in self._meters:
            meter.close()

    def _expire(self) -> None:
        self._is_late = True
        for request_id in self._request_ids:
            self._service.engine.abort(request_id)

    def _is_told(self, part: CompletionOutput, output: RequestOutput) -> bool:
        """Note what a part says; whether it has anything besides the error that ended it."""
        record = self._record
        if part.token_ids and record.first_token_time is None:
            record.first_token_time = time.monotonic()
        if part.finish_reason in _FAILURES:
            self._failure = self._failure or self._error_of(part, output)
            return bool(part.text or part.token_ids)
        if part.finish_reason is not None:
            record.finish_reasons.append(part.finish_reason)
        return True

    def _error_of(self, part: CompletionOutput, output: RequestOutput) -> ApiError:
        if part.finish_reason == "error":
            return ApiError(500, output.error or "the answer failed", code="generation_failed")
        if self._is_late:
            seconds = self._service.settings.request_seconds
            return ApiError(504, f"the answer took more than {seconds:g} s", code="timeout")
        return ApiError(503, "the answer was cut off", code="aborted")


def _refusal(service: Service, error: CapacityError) -> Exception:
    """What to raise where the engine has no room."""
    if isinstance(error, DrainingError) or not service.engine.healthy:
        return error  # coming again, here at least, is no use
    wait = service.metrics.retry_seconds()
    return ApiError(429, str(error), code="queue_full", retry_seconds=wait)


def _without_failure(part: CompletionOutput) -> CompletionOutput:
    return replace(part, finish_reason=None) if part.finish_reason in _FAILURES else part


async def open_outputs(
    service: Service,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    usage: Usage,
    record: RequestRecord,
    *,
    whole: bool,
) -> Outputs:
    """Begin to generate. With `whole`, each prompt has an output as it begins, and one at its end.

    Raises what the engine raises.
    """
    request_ids = [f"http-{secrets.token_hex(8)}" for _ in prompts]
    try:
        reader = await service.engine.read(prompts, params, request_ids, whole=whole)
    except CapacityError as error:  # of a front; an engine in this process lets `get` raise it
        raise _refusal(service, error) from None
    except BaseException as error:
        if isinstance(error, Exception | asyncio.CancelledError) or not is_fault(error):
            raise
        note_fault("a prompt", error)  # a panic in the library of tokenizers
        raise ApiError(500, "this prompt could not be read", code="generation_failed") from None
    return Outputs(service, reader, request_ids, usage, record)


async def gather_outputs(outputs: Outputs, count: int) -> list[list[RequestOutput]]:
    """What steps gave to each of `count` prompts, in their order."""
    parts: list[list[RequestOutput]] = [[] for _ in range(count)]
    while outputs.num_open:
        number, output = await outputs.get()
        parts[number].append(output)
    return parts
