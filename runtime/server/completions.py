"""`/v1/completions`: prompts of text or token ids to text, whole or as a stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

from ...ir.errors import RequestError
from ..requests.outputs import CompletionOutput, RequestOutput
from ..sampling.token_logprobs import TokenLogprobs
from .answering import answer
from .encoding import Joined, Shared
from .errors import ApiError
from .generation import Prompt
from .jobs import Job
from .logprobs import completion_logprobs, echoed_logprobs, prompt_logprobs
from .protocol import CompletionRequest
from .request_log import RequestRecord
from .service import Service

_DEFAULT_MAX_TOKENS = 16  # as OpenAI's API has it


async def create_completion(
    service: Service, request: CompletionRequest, record: RequestRecord
) -> Response:
    """Answers one request, and tells `record`.

    Raises RequestError, ApiError, and what the engine raises.
    """
    job = await read_completion(service, request, record)
    return await answer(service, job, record)


async def read_completion(
    service: Service, request: CompletionRequest, record: RequestRecord
) -> Job:
    """What the request is to become. Raises RequestError and ApiError."""
    service.check_request(request, request.logprobs)
    if request.stream and (request.best_of or request.n) > request.n:
        raise ApiError(
            400, "best_of cannot be streamed: the best are known at the end", param="best_of"
        )
    record.prompt = request.prompt
    prompts = parse_prompts(request.prompt, service.settings.max_prompts)
    for prompt in prompts:
        service.check_length(prompt, "prompt")
    limit = _DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    params = request.sampling(
        service.settings.sampling_defaults,
        max_tokens=service.output_limit(limit, "max_tokens"),
        logprobs=request.logprobs,
        prompt_logprobs=_num_prompt_logprobs(request),
        best_of=request.best_of,
    )
    token_ids = await service.encode(prompts)
    shape = _Choices(service, request, prompts)
    return Job(request, token_ids, params, shape)


def _num_prompt_logprobs(request: CompletionRequest) -> int | None:
    """What the engine is asked for: an echo has log-probabilities where the answer has them."""
    asked = [request.prompt_logprobs]
    if request.echo:
        asked += [request.logprobs, 0 if request.max_tokens == 0 else None]
    return max((count for count in asked if count is not None), default=None)


def parse_prompts(value: Any, limit: int) -> list[Prompt]:
    """One prompt or many: text, token ids, or a list of either; at most `limit` of them."""
    is_list = isinstance(value, list)
    if is_list and not value:
        raise RequestError("prompt is empty", field="prompt")
    # The first one tells; the others are looked at once it is known that they are not too many.
    is_many = is_list and type(value[0]) is not int
    prompts = value if is_many else [value]
    if len(prompts) > limit:
        raise RequestError(
            f"prompt contains {len(prompts)} prompts, the maximum is {limit}", field="prompt"
        )
    for index, prompt in enumerate(prompts):
        name = f"prompt[{index}]" if is_many else "prompt"
        if not isinstance(prompt, (str, list)):
            raise RequestError(f"{name} must be text or a list of token ids", field="prompt")
        if not prompt:
            raise RequestError(f"{name} is empty", field="prompt")
        if type(prompt) is not type(prompts[0]):
            raise RequestError("prompt mixes text and token ids", field="prompt")
    return prompts


class _Choices:
    """Writes choices, and keeps log-probabilities back until it is known where they belong."""

    prefix = "cmpl"
    whole_kind = chunk_kind = "text_completion"

    def __init__(
        self, service: Service, request: CompletionRequest, prompts: Sequence[Prompt]
    ) -> None:
        self._service = service
        self._request = request
        self._prompts = prompts
        self.with_ids = service.wants_token_ids(request)
        self._begins: dict[int, int] = {}  # of answers behind a prompt that is echoed
        self._held: dict[int, list[TokenLogprobs]] = {}
        self._entries: dict[int, Sequence[TokenLogprobs | None]] = {}  # by prompt
        # What all choices of a prompt have in common.
        self._echoes: dict[int, tuple[str, dict[str, Shared] | None]] = {}
        self._of_prompts: dict[int, Shared] = {}

    def whole(self, index: int, output: RequestOutput, part: CompletionOutput) -> dict[str, Any]:
        """A choice of a whole answer."""
        opening = self.opening(index, output)
        choice = self._choice(index, part)
        if opening is None:
            return choice
        logprobs, echoed = choice["logprobs"], opening["logprobs"]
        if logprobs is None:  # not asked for, or max_tokens is 0
            logprobs = echoed
        elif echoed is not None:
            logprobs = {name: Joined((echoed[name], logprobs[name])) for name in logprobs}
        return {**opening, **choice, "text": opening["text"] + part.text, "logprobs": logprobs}

    def opening(self, index: int, output: RequestOutput) -> dict[str, Any] | None:
        """The prompt, where it is to be echoed, and its log-probabilities, where asked for."""
        request = self._request
        number = index // request.n
        if output.prompt_logprobs is not None:  # with the first output alone
            self._entries[number] = output.prompt_logprobs
        if not request.echo and request.prompt_logprobs is None:
            return None
        text, logprobs = self._echo(number, output) if request.echo else ("", None)
        if logprobs is not None:
            self._begins[index] = len(text)
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}
        if request.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._of_prompt(number, request.prompt_logprobs)
        return choice

    def _echo(self, number: int, output: RequestOutput) -> tuple[str, dict[str, Shared] | None]:
        if number not in self._echoes:
            prompt, top, logprobs = self._prompts[number], self._request.logprobs, None
            text = prompt if isinstance(prompt, str) else self._service.text_of(prompt)
            if top is not None:
                ids, entries = output.prompt_token_ids, self._entries[number]
                lists = echoed_logprobs(ids, entries, text, self._service.token_texts, top)
                logprobs = {name: Shared(values) for name, values in lists.items()}
            self._echoes[number] = text, logprobs
        return self._echoes[number]

    def _of_prompt(self, number: int, top: int) -> Shared:
        if number not in self._of_prompts:
            entries = prompt_logprobs(self._entries[number], self._service.token_texts, top)
            self._of_prompts[number] = Shared(entries)
        return self._of_prompts[number]

    def chunk(self, index: int, part: CompletionOutput) -> dict[str, Any] | None:
        """What a step added to a choice."""
        choice = self._choice(index, part)
        tells = part.text or part.finish_reason or self.with_ids
        return choice if tells or (choice["logprobs"] or {}).get("tokens") else None

    def _choice(self, index: int, part: CompletionOutput) -> dict[str, Any]:
        choice = {
            "index": index,
            "text": part.text,
            "logprobs": self._logprobs(index, part),
            "finish_reason": part.finish_reason,
        }
        return {**choice, "token_ids": part.token_ids} if self.with_ids else choice

    def _logprobs(self, index: int, part: CompletionOutput) -> dict[str, Any] | None:
        if part.text_offsets is None or (part.logprobs is None and not part.text_offsets):
            return None
        entries = [*self._held.get(index, ()), *(part.logprobs or ())]
        count = len(part.text_offsets)
        self._held[index] = entries[count:]
        begin = self._begins.get(index, 0)
        return completion_logprobs(
            entries[:count],
            [begin + offset for offset in part.text_offsets],
            self._service.token_texts,
            self._request.logprobs or 0,
        )
