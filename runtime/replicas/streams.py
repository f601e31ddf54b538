"""One request at the front: what continues it anywhere, and what its caller has not read."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...ir.errors import InfcError
from ..async_streams import Inbox, Item
from ..requests.outputs import CompletionOutput, RequestMetrics, RequestOutput, merge_outputs
from ..requests.resumption import Progress, Resumption
from ..sampling.sampling_params import SamplingParams
from .messages import (
    Add,
    Added,
    completion_of,
    metrics_of,
    params_as_data,
    prompt_logprobs_of,
)
from .prefixes import prefix_digests
from .routing import Arrival


class RemoteStream:
    """A request that some engine process computes: a `Listener` of its caller's inbox.

    Everything that arrives is what was told of it, also while its caller is behind: that is kept
    here, joined together. `take` and `fail` are the front's, `want` is the caller's.
    """

    __slots__ = (
        "_kept",
        "_lock",
        "_metrics",
        "_params",
        "_priority",
        "_progress",
        "_salt",
        "_seed",
        "_wanted",
        "_whole",
        "arrival",
        "as_arrival",
        "has_ended",
        "inbox",
        "is_lost",
        "is_over",
        "is_proven",
        "is_sent",
        "is_unwanted",
        "num_steps",
        "num_strikes",
        "num_unread",
        "number",
        "params",
        "prompt",
        "request_id",
        "text",
    )

    def __init__(
        self,
        request_id: str,
        prompt: Sequence[int],
        params: SamplingParams,
        inbox: Inbox,
        number: int,
        text: str | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        whole: bool = False,
        resumed: Resumption | None = None,
        block_size: int | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt = tuple(prompt)
        self.params = params
        self.inbox = inbox
        self.number = number
        self.text = text
        digests = () if block_size is None else prefix_digests(prompt, cache_salt, block_size)
        self.as_arrival = Arrival(len(self.prompt), digests, block_size or 1)
        """Itself, for a policy."""
        self.is_lost = False
        self.has_ended = False
        self.is_over = False
        """Whether nothing more comes of it."""
        self.is_unwanted = False
        """Whether it was aborted: it ends, and is not continued."""
        self.arrival = 0
        self.num_strikes = 0
        """Engines that died with it, one after the other, without having told anything of it."""
        self.num_steps = 0
        """Of the engine that has it, as far as they were counted."""
        self.num_unread = len(self.prompt)
        """Tokens of its prompt that its engine has to compute before it can tell anything."""
        self.is_proven = False
        """Whether the engine that has it has told something of it."""
        self.is_sent = False
        """Whether the engine that has it was asked for it; one that has just died was not."""
        self._params: dict[str, Any] = params_as_data(params)
        self._priority = priority
        self._salt = cache_salt
        self._whole = whole
        self._progress = Progress() if resumed is None else Progress.of(resumed)
        self._seed = None if resumed is None else resumed.seed
        self._metrics = RequestMetrics(arrival_time=time.monotonic())
        self._kept: list[RequestOutput] = []
        self._wanted = True
        self._lock = threading.Lock()

    @property
    def has_told(self) -> bool:
        """Whether anything was told of it."""
        return self._seed is not None

    @property
    def rank(self) -> tuple[int, int]:
        """What has begun goes before what has not, and then what came first."""
        return (2 * self._priority - (self.has_told or self.num_strikes > 0), self.arrival)

    def order(self, number: int) -> Add:
        """What its next engine is asked for: the rest of it."""
        self.num_steps, self.is_proven = 0, False
        resumed = self._progress.resumption()
        return Add(
            number,
            self.prompt,
            self._params,
            self.rank[0],
            self._salt,
            self._whole,
            None if resumed is None else resumed.as_data(),
        )

    # --- for the front ------------------------------------------------------------------------

    def take(self, added: Added) -> RequestOutput | None:
        """Take in what an engine told; what is to be handed over now, if anything."""
        output = self._output_of(added)
        self.num_strikes, self.is_proven = 0, True
        if any(part.finish_reason == "abort" for part in output.outputs):
            self.is_over = True  # its own end: nothing continues it
        else:
            self._progress.add(output)
            self.is_over = output.finished
        with self._lock:
            if not self._wanted and not output.finished:
                self._kept.append(output)
                return None
            self._wanted = False
            parts, self._kept = [*self._kept, output], []
        return parts[0] if len(parts) == 1 else merge_outputs(parts)

    def last_items(self, error: InfcError) -> list[Item]:
        """What is handed over where it fails: what was kept, and the error."""
        self.is_over = True
        with self._lock:
            parts, self._kept, self._wanted = self._kept, [], False
        return [merge_outputs(parts), error] if parts else [error]

    def aborted(self) -> RequestOutput:
        """The last output of one that is aborted while no engine has it."""
        told = self._progress.resumption()
        ended = () if told is None else [choice.has_ended for choice in told.choices]
        open_ones = [i for i in range(self.params.n) if not (i < len(ended) and ended[i])]
        pieces = tuple([CompletionOutput(index=i, finish_reason="abort") for i in open_ones])
        output = RequestOutput(
            request_id=self.request_id,
            prompt_token_ids=self.prompt,
            outputs=pieces,
            metrics=replace(self._metrics, finished_time=time.monotonic()),
            finished=True,
            prompt=self.text,
            seed=self._seed,
        )
        self.is_over = True
        with self._lock:
            parts, self._kept, self._wanted = [*self._kept, output], [], False
        return merge_outputs(parts)

    def _output_of(self, added: Added) -> RequestOutput:
        if added.seed is not None:
            self._seed = added.seed
        if added.times is not None:
            self._metrics = self._merged(metrics_of(added.times))
        return RequestOutput(
            request_id=self.request_id,
            prompt_token_ids=self.prompt,
            outputs=tuple([completion_of(piece) for piece in added.pieces]),
            metrics=self._metrics,
            finished=added.finished,
            prompt=self.text,
            prompt_logprobs=prompt_logprobs_of(added),
            error=added.error,
            seed=self._seed,
        )

    def _merged(self, times: RequestMetrics) -> RequestMetrics:
        """Times of the whole request, of which this engine may have computed the rest only."""
        before = self._metrics
        if before.first_scheduled_time is None:
            return replace(times, arrival_time=before.arrival_time)
        return replace(
            times,
            arrival_time=before.arrival_time,
            first_scheduled_time=before.first_scheduled_time,
            first_token_time=before.first_token_time or times.first_token_time,
            num_cached_tokens=before.num_cached_tokens,
        )

    # --- for the caller's loop ----------------------------------------------------------------

    def want(self) -> None:
        """The caller has read everything: it gets at once what was kept meanwhile."""
        with self._lock:
            if not self._kept:
                self._wanted = True
                return
            parts, self._kept = self._kept, []
        self.inbox.put(self, merge_outputs(parts))
