"""A request on its way through the engine: tokens, progress, state and blocks."""

from __future__ import annotations

import enum
import secrets
import time

from .kv_cache import SequenceBlocks
from .logits_adjuster import LogitsAdjuster, TokenConstraint
from .outputs import FinishReason, RequestMetrics
from .sampling_params import SamplingParams


class RequestState(enum.Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """One sequence to continue. Mutable: the scheduler owns it from `add` to its end.

    `token_ids` holds prompt and output; the first `num_computed` of them have their KV in the
    cache. A smaller `priority` goes first, then the earlier `arrival`.
    """

    __slots__ = (
        "adjuster",
        "arrival",
        "arrival_time",
        "blocks",
        "choice",
        "end_token_ids",
        "error",
        "finish_reason",
        "finished_time",
        "first_scheduled_time",
        "first_token_time",
        "last_token_time",
        "max_total_tokens",
        "num_cached_tokens",
        "num_computed",
        "num_logprobs",
        "num_preemptions",
        "num_prompt_tokens",
        "params",
        "priority",
        "request_id",
        "seed",
        "state",
        "stop_reason",
        "token_ids",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        eos_token_ids: tuple[int, ...] = (),
        constraint: TokenConstraint | None = None,
    ) -> None:
        self.request_id = request_id
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.params = params
        self.priority = priority
        self.choice = 0
        ends = params.stop_token_ids
        self.end_token_ids = frozenset(ends if params.ignore_eos else (*ends, *eos_token_ids))
        self.adjuster: LogitsAdjuster | None = None
        if LogitsAdjuster.is_needed(params, constraint):
            self.adjuster = LogitsAdjuster(
                params, self.num_prompt_tokens, self.end_token_ids, constraint
            )
        self.num_logprobs = params.logprobs
        # One seed for its whole life, so that preemption never changes what comes next.
        self.seed = (secrets.randbits(63) if params.seed is None else params.seed) & (2**64 - 1)
        self.arrival = 0
        self.max_total_tokens = 0
        self.num_computed = 0
        self.state = RequestState.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.error: str | None = None
        self.blocks = SequenceBlocks(cache_salt)
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.arrival_time = time.monotonic()
        self.first_scheduled_time: float | None = None
        self.first_token_time: float | None = None
        self.last_token_time: float | None = None
        self.finished_time: float | None = None

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: who is served first, and who is preempted last."""
        return (self.priority, self.arrival)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    def metrics(self) -> RequestMetrics:
        """The times and counts so far."""
        return RequestMetrics(
            arrival_time=self.arrival_time,
            first_scheduled_time=self.first_scheduled_time,
            first_token_time=self.first_token_time,
            last_token_time=self.last_token_time,
            finished_time=self.finished_time,
            num_cached_tokens=self.num_cached_tokens,
            num_preemptions=self.num_preemptions,
        )
