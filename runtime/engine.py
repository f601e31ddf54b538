"""The engine: requests in, tokens and text out, one step at a time; owned by one thread."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ..ir.artifact import Artifact, Verification, open_artifact
from ..ir.errors import InfcError, RequestError
from .detokenizer import Detokenizer
from .executors import open_executor
from .executors.base import Executor, ExecutorConfig
from .kv_cache import KvCache
from .limits import RuntimeOptions, RuntimePlan, plan_runtime
from .outputs import CompletionOutput, RequestOutput, TokenLogprobs
from .request import Request
from .sampler import Sample, sample_rows
from .sampling_params import SamplingParams
from .scheduler import Scheduler
from .step import Step, StepTimes
from .tokenizer import Tokenizer

_MAX_SALT_CHARACTERS = 256


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A glance at the engine: requests, and blocks over all groups."""

    num_waiting: int
    num_running: int
    num_free_blocks: int
    num_blocks: int
    num_preemptions: int
    num_steps: int


@dataclass(slots=True)
class _Stream:
    """What the engine keeps of a request beside the scheduler."""

    request: Request
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    detokenizer: Detokenizer | None


class Engine:
    """Serves one model. Not thread-safe: `AsyncEngine` gives it a thread of its own."""

    def __init__(
        self,
        executor: Executor,
        plan: RuntimePlan,
        *,
        vocab_size: int,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.executor = executor
        self.plan = plan
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.scheduler = _make_scheduler(plan)
        self.num_steps = 0
        self.on_step: Callable[[StepTimes], None] | None = None
        """Told of each step that ran to its end, on the engine's thread: it must be quick."""
        self._executor_seconds = 0.0
        self._streams: dict[str, _Stream] = {}
        self._weights_check: Future[None] | None = None
        self._closed = False
        self._settled = True
        self._owner: int | None = None  # the thread that is in `step`

    @classmethod
    def open(
        cls,
        artifact: Artifact | str | os.PathLike[str],
        options: RuntimeOptions | None = None,
        *,
        verify: Verification = "stamp",
    ) -> Engine:
        """The engine of an artifact. Its weights are checked while it starts.

        Raises ArtifactError, TargetError, or CapacityError for what does not fit.
        """
        if not isinstance(artifact, Artifact):
            artifact = open_artifact(artifact, verify, weights="later")
        check = artifact.verify_weights()
        plan = plan_runtime(artifact.manifest, options or RuntimeOptions())
        config = ExecutorConfig(
            num_blocks=plan.num_blocks, num_threads=plan.num_threads, pin=plan.pin
        )
        engine = cls(
            open_executor(artifact, config),
            plan,
            vocab_size=artifact.manifest.model.vocab_size,
            tokenizer=Tokenizer.load(artifact),
        )
        engine._weights_check = check
        return engine

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_unfinished

    def stats(self) -> EngineStats:
        """Counts of now."""
        pools = self.scheduler.kv.pools
        return EngineStats(
            num_waiting=self.scheduler.num_waiting,
            num_running=self.scheduler.num_running,
            num_free_blocks=sum(pool.num_free for pool in pools),
            num_blocks=sum(pool.capacity for pool in pools),
            num_preemptions=self.scheduler.num_preemptions,
            num_steps=self.num_steps,
        )

    def add_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        priority: int = 0,
        *,
        cache_salt: str = "",
    ) -> None:
        """Queue a request; a smaller `priority` goes first.

        Prefixes are shared only between requests of the same `cache_salt`. Raises RequestError
        for what can never be served, CapacityError when the queue is full, InfcError once the
        engine is closed.
        """
        if self._closed:
            raise InfcError("the engine is closed")
        params = SamplingParams() if params is None else params
        token_ids = self.encode(prompt)
        self._check(params, cache_salt)
        if type(priority) is not int:
            raise RequestError(f"priority must be an integer, not {priority!r}", field="priority")
        request = Request(
            request_id,
            token_ids,
            params,
            priority=priority,
            cache_salt=cache_salt,
            eos_token_ids=self.tokenizer.eos_token_ids if self.tokenizer else (),
        )
        detokenizer = None
        if self.tokenizer is not None:
            decoder = self.tokenizer.stream_decoder(
                skip_special_tokens=params.skip_special_tokens, context=token_ids
            )
            detokenizer = Detokenizer(decoder, params.stop_strings, params.min_tokens)
        self.scheduler.add(request)
        text = prompt if isinstance(prompt, str) else None
        self._streams[request_id] = _Stream(request, text, tuple(token_ids), detokenizer)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request at any moment; its last output, None if it is unknown or has finished."""
        request = self.scheduler.abort(request_id)
        return None if request is None else self._output(self._streams[request_id])

    def abort_all(self) -> None:
        """End every request."""
        for request_id in list(self._streams):
            self.abort(request_id)

    def step(self) -> list[RequestOutput]:
        """Run one step; what it added to each request that got a token or ended.

        Ctrl-C may come anywhere in it. Where it leaves things half done, all requests are given
        up, and the engine starts from nothing.
        """
        thread = threading.get_ident()
        # Not a lock: an interrupted owner may come back, and only others are kept out.
        if self._owner not in (None, thread):
            raise InfcError(
                "another thread is in this engine", hint="AsyncEngine serves many callers at once"
            )
        self._owner = thread
        self._settled = False
        begun = time.perf_counter()
        try:
            step = self.scheduler.schedule()
            samples = self._execute(step)
            outputs = self._publish(step, samples)
            self._settled = True
            if step is not None and self.on_step is not None:
                seconds = time.perf_counter() - begun
                self.on_step(StepTimes.of(step, seconds, self._executor_seconds))
        except BaseException:
            if not self._settled:
                self.scheduler, self._streams = _make_scheduler(self.plan), {}
            raise
        finally:
            self._owner = None
        return outputs

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The tokens of a prompt, checked. Thread-safe."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError(
                    "this model has no tokenizer", field="prompt", hint="send token ids"
                )
            return self._checked_ids(self.tokenizer.encode(prompt))
        return self._checked_ids(prompt)

    def close(self) -> None:
        """End every request, and give threads and memory back."""
        self._closed = True
        self.abort_all()
        self.executor.close()

    # --- inside -------------------------------------------------------------------------------

    def _checked_ids(self, token_ids: Sequence[int]) -> list[int]:
        if isinstance(token_ids, bytes) or not isinstance(token_ids, Sequence):
            raise RequestError("the prompt must be text or token ids", field="prompt")
        ids = list(token_ids)
        if not all(type(token) is int and 0 <= token < self.vocab_size for token in ids):
            wrong = next(t for t in ids if type(t) is not int or not 0 <= t < self.vocab_size)
            raise RequestError(
                f"{wrong!r} is no token id, they are 0..{self.vocab_size - 1}", field="prompt"
            )
        return ids

    def _check(self, params: Any, cache_salt: str) -> None:
        if not isinstance(params, SamplingParams):
            raise RequestError(
                f"params must be SamplingParams, not {type(params).__name__}",
                field="params",
                hint="write SamplingParams(max_tokens=64)",
            )
        for field, tokens in params.token_fields.items():
            for token in tokens:
                if token >= self.vocab_size:
                    raise RequestError(
                        f"{field}: {token} is no token id, they are 0..{self.vocab_size - 1}",
                        field=field,
                    )
        if params.num_choices > 1 or params.prompt_logprobs is not None:
            name = "prompt_logprobs" if params.num_choices == 1 else "n"
            raise RequestError(f"{name} is not built yet", field=name)
        if params.stop_strings and self.tokenizer is None:
            raise RequestError(
                "this model has no tokenizer", field="stop", hint="use stop_token_ids"
            )
        if len(cache_salt) > _MAX_SALT_CHARACTERS:
            raise RequestError(
                f"cache_salt is longer than {_MAX_SALT_CHARACTERS} characters", field="cache_salt"
            )

    def _execute(self, step: Step | None) -> list[Sample]:
        """Run and commit the step; where that fails, all of its requests end with an error."""
        if step is None:
            return []
        try:
            begun = time.perf_counter()
            logits = self.executor.run(step)
            self._executor_seconds = time.perf_counter() - begun
            if self._weights_check is not None:  # no token leaves before the weights are known good
                self._weights_check.result()
                self._weights_check = None
            samples = sample_rows(logits, step.sampled)
        except BaseException:
            self.scheduler.discard(step)
            for request in step.requests:
                del self._streams[request.request_id]
            self._settled = True
            raise
        self.scheduler.commit(step, [sample.token_id for sample in samples])
        self.num_steps += 1
        return samples

    def _publish(self, step: Step | None, samples: list[Sample]) -> list[RequestOutput]:
        if step is None:
            return []
        return [
            self._output(self._streams[request.request_id], sample)
            for request, sample in zip(step.sampled, samples, strict=True)
        ]

    def _output(self, stream: _Stream, sample: Sample | None = None) -> RequestOutput:
        """What a token added; without one, the end of an aborted request."""
        request = stream.request
        tokens: tuple[int, ...] = ()
        logprobs: tuple[TokenLogprobs, ...] | None = None
        if sample is not None and sample.token_id is not None:
            tokens = (sample.token_id,)
            logprobs = None if sample.logprobs is None else (sample.logprobs,)
        elif sample is not None:
            request.error = "the logits hold no finite value"
        text = self._text(stream, tokens)
        if request.finish_reason is not None:
            del self._streams[request.request_id]
        completion = CompletionOutput(
            text=text,
            token_ids=tokens,
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            logprobs=logprobs,
        )
        return RequestOutput(
            request_id=request.request_id,
            prompt=stream.prompt,
            prompt_token_ids=stream.prompt_token_ids,
            outputs=(completion,),
            metrics=request.metrics(),
            error=request.error,
        )

    def _text(self, stream: _Stream, tokens: tuple[int, ...]) -> str:
        """The text that is certain now. A stop string ends the request here."""
        request, detokenizer = stream.request, stream.detokenizer
        if detokenizer is None:
            return ""
        text = ""
        if tokens and request.stop_reason is None:  # a token that ends it is no text
            text = detokenizer.push(tokens[0])
        if request.finish_reason is not None:
            text += detokenizer.flush()
        if detokenizer.matched_stop is not None:
            if request.finish_reason is None:
                self.scheduler.finish(request, "stop")
            if request.finish_reason == "length":
                request.finish_reason = "stop"
            request.stop_reason = detokenizer.matched_stop
        return text


def _make_scheduler(plan: RuntimePlan) -> Scheduler:
    kv = KvCache(
        plan.groups,
        plan.num_blocks,
        max_sequences=plan.limits.max_running,
        max_context=plan.limits.max_context,
        prefix_reuse=plan.prefix_reuse,
    )
    return Scheduler(plan.limits, kv)
