"""From the body of a request to its answer, which depends on the body, the model and the name."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ...ir.artifact import Artifact
from ...ir.errors import InfcError
from ..faults import GivenUpError, is_fault, note_fault
from ..options import RuntimeOptions
from ..server.answering import whole_answer
from ..server.bodies import check_fields
from ..server.chat import naming_fields, read_chat
from ..server.completions import read_completion
from ..server.encoding import encode
from ..server.errors import ApiError, as_api_error
from ..server.metrics import ServerMetrics
from ..server.protocol import ChatRequest, CompletionRequest
from ..server.request_log import RequestRecord
from ..server.service import Service
from ..server.settings import ServerSettings, recommended_defaults
from ..server.usage import Usage

if TYPE_CHECKING:
    from ..server.jobs import Job
    from ..server.served import ServedEngine
    from ..text.tokenizer import Tokenizer

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
ROUTES: Final = (CHAT, COMPLETIONS)

_NO_TIMEOUT_SECONDS = 2.0**31 - 1  # an answer must not depend on how long it takes
_ATTEMPTS = 3  # of a row whose step fails
_FULL_SECONDS = 0.05  # until a full queue is asked again
_SEED_BITS = 63


def row_seed(job_seed: int, row_id: str) -> int:
    """The seed of a row that has none of its own."""
    digest = hashlib.blake2b(f"{job_seed}\n{row_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> (64 - _SEED_BITS)


def batch_settings(artifact: Artifact, names: Sequence[str]) -> ServerSettings:
    """As the server has them by default, but that no answer is given up for its time."""
    files = artifact.manifest.tokenizer
    recommended = recommended_defaults(files.generation if files else None)
    return ServerSettings(
        model_names=tuple(names), request_seconds=_NO_TIMEOUT_SECONDS, **recommended
    )


def whole_context(artifact: Artifact, options: RuntimeOptions) -> int:
    """The context to ask for, so that it is never reduced to what memory is free.

    Answers may depend on it: one that has no limit of its own ends there.
    """
    if options.max_context is not None:
        return options.max_context
    return artifact.manifest.main.limits.max_context


@dataclass(frozen=True, slots=True)
class BodyAnswer:
    """An HTTP status, and the JSON that the server would send.

    `again` says that another attempt may end in another way.
    """

    status: int
    body: bytes
    again: bool = False


class BodyAnswers:
    """Answers bodies with an engine, as the server does, and always with the same bytes.

    Left out is what depends on other requests: `created` is 0, and `usage` does not say how many
    tokens of the prompt were cached.
    """

    def __init__(
        self, engine: ServedEngine, tokenizer: Tokenizer | None, settings: ServerSettings
    ) -> None:
        metrics = ServerMetrics(engine, {"model_name": settings.model_name})
        self._service = Service(engine, tokenizer, settings, metrics)
        self._alone = asyncio.Lock()

    async def answer(self, url: str, body: dict[str, Any], *, name: str, seed: int) -> BodyAnswer:
        """The answer to a body of one of the ROUTES, whose id is `name`.

        `seed` is for a body that has none. Raises InfcError once the engine has stopped.
        """
        if body.get("seed") is None:
            body = {**body, "seed": seed}
        result = await self._attempt(url, body, name)
        if not result.again:
            return result
        # The step failed, for this row or for one beside it. Rows that are suspected run one
        # after the other, so none fails twice because of another.
        async with self._alone:
            for _ in range(1, _ATTEMPTS):
                result = await self._attempt(url, body, name)
                if not result.again:
                    break
        return result

    async def _attempt(self, url: str, body: dict[str, Any], name: str) -> BodyAnswer:
        while True:
            try:
                return BodyAnswer(200, await self._answer(url, body, name))
            except BaseException as error:
                # A panic in the library of tokenizers is no Exception.
                if not is_fault(error) or isinstance(error, asyncio.CancelledError):
                    raise
                if not self._service.engine.healthy:
                    raise InfcError("the engine has stopped") from error
                refusal = _refusal(error)
            if refusal.status != 429:
                # What has killed engines is not given to another one.
                again = refusal.status >= 500 and not isinstance(refusal.__cause__, GivenUpError)
                return BodyAnswer(refusal.status, encode(refusal.body), again)
            await asyncio.sleep(_FULL_SECONDS)

    async def _answer(self, url: str, body: dict[str, Any], name: str) -> bytes:
        service, record = self._service, RequestRecord(name)
        limit = service.settings.max_messages
        if url == CHAT:
            chat = check_fields(body, ChatRequest, limit)
            _refuse_stream(chat.stream)
            with naming_fields(chat):
                return await self._whole(await read_chat(service, chat, record), record)
        request = check_fields(body, CompletionRequest, limit)
        _refuse_stream(request.stream)
        return await self._whole(await read_completion(service, request, record), record)

    async def _whole(self, job: Job, record: RequestRecord) -> bytes:
        shape = job.shape
        head = {
            "id": f"{shape.prefix}-{record.request_id}",
            "object": shape.whole_kind,
            "created": 0,
            "model": job.request.model,
        }
        return b"".join(await whole_answer(self._service, job, record, head, _SameUsage()))


def _refusal(error: BaseException) -> ApiError:
    if isinstance(error, Exception):
        return as_api_error(error)
    note_fault("a request", error)
    return ApiError(500, "this request could not be read", code="generation_failed")


def _refuse_stream(stream: bool) -> None:
    if stream:
        raise ApiError(400, "stream is not supported in a batch", param="stream", code="not_built")


class _SameUsage(Usage):
    """Without what depends on other requests."""

    def as_json(self) -> dict[str, Any]:
        counts = super().as_json()
        del counts["prompt_tokens_details"]
        return counts
