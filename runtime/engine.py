"""The engine: requests in, tokens and text out, one step at a time; owned by one thread."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from ..ir.artifact import Artifact, Verification, check_verification, open_artifact
from ..ir.errors import InfcError, RequestError
from .executors.base import Executor, work_ahead
from .faults import note_fault
from .in_flight import Flight, StepsInFlight
from .limits import RuntimePlan
from .memory_plan import Lease
from .opened_parts import open_parts
from .options import RuntimeOptions
from .publisher import Publisher
from .requests.outputs import FinishReason, RequestOutput
from .requests.pooling import Pool, Pooling
from .requests.request import Request
from .requests.request_checks import (
    check_choosable,
    check_params,
    check_place,
    checked_ids,
    stop_texts,
)
from .requests.request_stream import PreparedRequest, RequestStream
from .requests.resumption import Resumption, check_resumption
from .sampling.logits_adjuster import TokenConstraint
from .sampling.sampling_params import SamplingParams, recommended_sampling
from .scheduling.owners import PlannedStep, StepTimes
from .scheduling.scheduler import Scheduler
from .scheduling.step_results import StepResults, read_results
from .text.tokenizer import Tokenizer

_READ_ONLY = SamplingParams(max_tokens=0, prompt_logprobs=0)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A glance at the engine: requests, and blocks over all groups."""

    num_waiting: int
    num_running: int
    num_free_blocks: int
    num_blocks: int
    num_preemptions: int
    num_steps: int


class Engine:
    """Serves one model. Not thread-safe: `AsyncEngine` gives it a thread of its own."""

    def __init__(
        self,
        executor: Executor,
        plan: RuntimePlan,
        *,
        vocab_size: int,
        tokenizer: Tokenizer | None = None,
        hidden_width: int | None = None,
    ) -> None:
        self.executor = executor
        self.hidden_width = hidden_width
        self.plan = plan
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        self.scheduler = self._new_scheduler()
        self.num_steps = 0
        self.on_step: Callable[[StepTimes], None] | None = None
        """Told of each step that ran to its end, on the engine's thread: it must be quick."""
        self._in_flight = StepsInFlight()
        self._recommended: dict[str, Any] = {}
        self._publisher = Publisher(self._abort)
        self._weights_check: Future[None] | None = None
        self._lease: Lease | None = None
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
        takes_text: bool = True,
    ) -> Engine:
        """The engine of an artifact. Its weights are checked while it starts.

        One that is open already is checked as it was opened: `verify` is for a path. Without
        `takes_text`, prompts are token ids, and the tokenizer takes less memory.
        Raises ArtifactError, TargetError, or CapacityError for what does not fit.
        """
        check_verification(verify)
        if not isinstance(artifact, Artifact):
            artifact = open_artifact(artifact, verify, weights="later")
        check = artifact.verify_weights()
        chosen = options or RuntimeOptions()
        parts = open_parts(artifact, chosen, only_decodes=not takes_text)
        try:
            engine = cls(
                parts.executor,
                parts.plan,
                vocab_size=artifact.manifest.model.vocab_size,
                tokenizer=parts.tokenizer,
                hidden_width=artifact.manifest.main.hidden_width,
            )
        except BaseException:
            parts.close()
            raise
        engine._weights_check = check
        engine._lease = parts.lease
        files = artifact.manifest.tokenizer
        engine._recommended = recommended_sampling(files.generation if files else None)
        return engine

    def recommended_params(self, **given: Any) -> SamplingParams:
        """What the checkpoint's generation_config.json recommends; `given` wins over it."""
        return SamplingParams(**{**self._recommended, **given})

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return self.scheduler.has_unfinished or len(self._in_flight) > 0

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
        constraint: TokenConstraint | None = None,
        whole: bool = False,
        resumed: Resumption | None = None,
    ) -> None:
        """Queue a request; a smaller `priority` goes first.

        Prefixes are shared only between requests of the same `cache_salt`. `constraint` says
        before each token which may come. With `whole`, `step` tells of its first token, and then
        of all others at its end. `resumed` is what another engine told of this very request,
        which goes on behind it. Raises RequestError for what can never be served, CapacityError
        when the queue is full, InfcError once the engine is closed.
        """
        self.submit(
            self.prepare(
                request_id,
                prompt,
                params,
                priority,
                cache_salt=cache_salt,
                constraint=constraint,
                whole=whole,
                resumed=resumed,
            )
        )

    def prepare(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        priority: int = 0,
        *,
        cache_salt: str = "",
        constraint: TokenConstraint | None = None,
        whole: bool = False,
        resumed: Resumption | None = None,
    ) -> PreparedRequest:
        """Check and build a request, on any thread: long prompts and lists take a while.

        Raises RequestError as `add_request`, whose arguments these are.
        """
        params = SamplingParams() if params is None else params
        token_ids = self.encode(prompt)
        known = self.tokenizer.eos_token_ids if self.tokenizer else ()
        ends = tuple(token for token in known if token < self.vocab_size)
        has_tokenizer = self.tokenizer is not None
        check_params(params, vocab_size=self.vocab_size, has_tokenizer=has_tokenizer)
        check_place(priority, cache_salt)
        request = Request(
            request_id,
            token_ids,
            params,
            priority=priority,
            cache_salt=cache_salt,
            eos_token_ids=ends,
            stop_texts=stop_texts(params, self.tokenizer, self.vocab_size),
            constraint=constraint,
            vocab_size=self.vocab_size,
        )
        check_choosable(params, request.end_token_ids, vocab_size=self.vocab_size)
        return self._prepared(request, prompt, whole=whole, resumed=resumed)

    def submit(self, prepared: PreparedRequest) -> None:
        """Queue what `prepare` or `prepare_reading` gave.

        Raises RequestError for what can never be served, CapacityError when the queue is full,
        InfcError once the engine is closed.
        """
        if self._closed:
            raise InfcError("the engine is closed")
        request, is_known = prepared.request, self.knows(prepared.request.request_id)
        try:
            self.scheduler.add(request, *prepared.others)
            self._publisher.streams[request.request_id] = prepared.stream
        except BaseException:
            if not is_known:  # one that runs and has no stream could not be ended
                self.scheduler.abort(request.request_id)
                self._publisher.forget(request.request_id)
            raise

    def knows(self, request_id: str) -> bool:
        """Whether the request was queued and has not ended."""
        return request_id in self._publisher.streams

    def read_prompt(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        *,
        pooling: Pooling | None = None,
        first_scored: int = 1,
        priority: int = 0,
        cache_salt: str = "",
    ) -> None:
        """Queue a prompt that is only read.

        With `pooling` its output has an `embedding`; without, `prompt_logprobs` from token
        `first_scored` on. Raises what `add_request` does, and RequestError where the artifact
        gives no hidden states to pool.
        """
        self.submit(
            self.prepare_reading(
                request_id,
                prompt,
                pooling=pooling,
                first_scored=first_scored,
                priority=priority,
                cache_salt=cache_salt,
            )
        )

    def prepare_reading(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        *,
        pooling: Pooling | None = None,
        first_scored: int = 1,
        priority: int = 0,
        cache_salt: str = "",
    ) -> PreparedRequest:
        """Check and build what `read_prompt` queues, on any thread; its errors and arguments."""
        check_place(priority, cache_salt)
        request = Request(
            request_id, self.encode(prompt), _READ_ONLY, priority=priority, cache_salt=cache_salt
        )
        if pooling is not None:
            if self.hidden_width is None:
                raise RequestError(
                    "this artifact gives no hidden states",
                    field="pooling",
                    hint="compile it again; a model whose head is not found has none",
                )
            request.pool = Pool(pooling, self.hidden_width)
        # What comes before is not wanted, and may be taken from a cached prefix.
        request.num_prompt_rows = first_scored - 1
        return self._prepared(request, prompt)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request at any moment; its last output, None if it is unknown or has finished."""
        return self._publisher.end(request_id, "abort")

    def abort_all(self) -> None:
        """End every request."""
        for request_id in list(self._publisher.streams):
            self.abort(request_id)

    def step(self) -> list[RequestOutput]:
        """Launch the next step, and tell of one that has run: what it added to each request.

        Where the executor takes a step while another runs (`Executor.depth`), the next one is
        launched first, so what a step gave is told while the next one runs.

        Ctrl-C may come anywhere in it. Where it leaves things half done, all requests are given
        up, and the engine starts from nothing.
        """
        thread = threading.get_ident()
        # Not a lock: an interrupted owner may come back, and only others are kept out.
        if self._owner not in (None, thread):
            raise InfcError(
                "another thread is in this engine", hint="AsyncEngine serves many callers at once"
            )
        in_flight, outputs = self._in_flight, list[RequestOutput]()
        self._owner, self._settled = thread, False
        try:
            launched = self._launch_next()
            if len(in_flight) > (self.executor.depth if launched else 0):
                flight = in_flight.first
                outputs = self._publisher.publish(flight.planned, self._settle(flight))
                self._observe(flight)
            self._settled, self._owner = True, None
            return outputs
        except BaseException:
            if outputs or not self._settled:  # without these, answers would lack a part
                self.scheduler, self._publisher = self._new_scheduler(), Publisher(self._abort)
                self._in_flight.forget()
            self._owner = None
            raise

    def work_ahead(self, seconds: float = math.inf) -> bool:
        """Make later steps faster, for about so long, while nobody waits; whether more can be done.

        Steps do it too, beside their own work: here it costs nobody anything.
        """
        return not self._closed and work_ahead(self.executor, seconds)

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The tokens of a prompt, checked. Thread-safe."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError(
                    "this model has no tokenizer", field="prompt", hint="send token ids"
                )
            return checked_ids(self.tokenizer.encode(prompt), self.vocab_size)
        return checked_ids(prompt, self.vocab_size)

    def close(self) -> None:
        """End every request, and give threads and memory back."""
        try:
            self.abort_all()
            self._in_flight.drain()
        finally:
            self.give_back()

    def give_back(self) -> None:
        """Give threads and memory back, whatever state requests and steps are in."""
        self._closed = True
        if self._lease is not None:
            self._lease.end()
        self.executor.close()

    # --- inside -------------------------------------------------------------------------------

    def _prepared(
        self,
        request: Request,
        prompt: str | Sequence[int],
        *,
        whole: bool = False,
        resumed: Resumption | None = None,
    ) -> PreparedRequest:
        # Before each choice takes a copy of the prompt.
        most_tokens = self.scheduler.check_fits(request) - request.num_prompt_tokens
        if resumed is not None:
            check_resumption(
                resumed, request.params, vocab_size=self.vocab_size, most_tokens=most_tokens
            )
        request.make_choices()
        text = prompt if isinstance(prompt, str) else None
        stream = RequestStream(request, text, self.tokenizer, self._stop, whole=whole)
        if resumed is None:
            return PreparedRequest(request, stream)
        first, *others = stream.resume(resumed)
        return PreparedRequest(first, stream, tuple(others))

    def _launch_next(self) -> bool:
        """Plan and launch a step; False where there is none."""
        begun = time.perf_counter()
        if (planned := self._schedule()) is None:
            return False
        flight = self._in_flight.add(planned, begun)
        try:
            flight.launch(self.executor)
        except BaseException:
            self._discard(flight)
            raise
        return True

    def _schedule(self) -> PlannedStep | None:
        """The next step. Where it cannot be made, all requests begin anew, and none is lost."""
        try:
            return self.scheduler.schedule(late_masks=self._in_flight.late_masks(self.executor))
        except Exception:
            self._in_flight.drain()
            fresh = self._new_scheduler()
            fresh.take_over(self.scheduler)
            self.scheduler, self._settled = fresh, True
            raise

    def _observe(self, flight: Flight) -> None:
        """Take in how long a step took. Whatever that meets, the step was made."""
        try:
            seconds = self._in_flight.seconds_of(flight)
            self.scheduler.observe(flight.planned, seconds)
            if self.on_step is not None:
                waited, gaps = flight.executor_seconds, self.scheduler.token_gaps
                self.on_step(StepTimes.of(flight.planned, seconds, waited, gaps))
        except Exception as error:
            note_fault("a measurement of a step", error)

    def _settle(self, flight: Flight) -> StepResults:
        """Wait for a step and settle it; where it fails, all of its requests end with an error."""
        try:
            output = flight.result()
            if self._weights_check is not None:  # no token leaves before the weights are known good
                self._weights_check.result()
                self._weights_check = None
            results = read_results(flight.planned, output)
        except BaseException:
            self._discard(flight)
            raise
        runs = [
            None if sample is None or (token := sample.token_id) is None else (token,)
            for sample in results.samples
        ]
        self.scheduler.settle(flight.planned, runs)
        self._in_flight.end_first()
        self.num_steps += 1
        return results

    def _discard(self, failed: Flight) -> None:
        """Give up a step that failed, and those launched after it."""
        self._in_flight.give_up(failed)
        for request in self.scheduler.discard(failed.planned):
            self._publisher.forget(request.request_id)
        self._settled = True

    def _abort(self, request_id: str, reason: FinishReason) -> list[Request]:
        return self.scheduler.abort(request_id, reason)

    def _stop(self, request: Request) -> None:
        self.scheduler.finish(request, "stop")

    def _new_scheduler(self) -> Scheduler:
        return Scheduler(self.plan.limits, self.plan.make_cache())
