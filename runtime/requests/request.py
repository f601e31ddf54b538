"""A request on its way through the engine: tokens, progress, state and blocks."""

from __future__ import annotations

import enum
import secrets
import time
from collections.abc import Mapping, Sequence

from ..sampling.draws import LEAST_TEMPERATURE, Draw
from ..sampling.logits_adjuster import LogitsAdjuster, TokenConstraint
from ..sampling.sampling_params import SamplingParams
from .outputs import FinishReason, RequestMetrics
from .pooling import Pool
from .sequence_blocks import SequenceBlocks


class RequestState(enum.Enum):
    """Where a request is."""

    WAITING = "waiting"
    RUNNING = "running"
    UNFORKED = "unforked"  # a further choice, until the first has computed the prompt
    FINISHED = "finished"


class Request:
    """One sequence to continue. Mutable: the scheduler owns it from `add` to its end.

    `token_ids` holds prompt and output as far as they are known. The KV of the first
    `num_computed` tokens is in the cache, or will be once the steps in flight have run: where
    those draw tokens, that may be more than are known. A smaller `priority` goes first, then the
    earlier `arrival`. Of several choices each is a sequence of its own: `choice` 0 computes the
    prompt, and the others, its `unforked`, go on from there. `num_prompt_rows` rows of the prompt
    have been given, or are not wanted. A request with a `pool` wants hidden states, and no logits.
    `is_lead` says whether it stands for the whole request in the queue: its first choice, or the
    first that has not ended of one that is resumed.
    """

    __slots__ = (
        "adjuster",
        "arrival",
        "arrival_time",
        "blocks",
        "cache_salt",
        "choice",
        "end_token_ids",
        "error",
        "finish_reason",
        "finished_time",
        "first_scheduled_time",
        "first_token_time",
        "is_lead",
        "last_token_time",
        "max_total_tokens",
        "num_cached_tokens",
        "num_computed",
        "num_logprobs",
        "num_preemptions",
        "num_prompt_rows",
        "num_prompt_tokens",
        "params",
        "pool",
        "priority",
        "request_id",
        "seed",
        "state",
        "stop_reason",
        "stop_texts",
        "token_ids",
        "unforked",
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
        stop_texts: Mapping[int, str] | None = None,
        constraint: TokenConstraint | None = None,
        vocab_size: int | None = None,
        adjuster: LogitsAdjuster | None = None,
    ) -> None:
        """`vocab_size` is needed for lists of tokens and for a constraint."""
        self.request_id = request_id
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.params = params
        self.priority = priority
        self.choice, self.is_lead = 0, True
        # Stop strings that are tokens which leave no text: they end an answer by their ids.
        self.stop_texts: Mapping[int, str] = stop_texts or {}
        ends = (*params.stop_token_ids, *self.stop_texts)
        self.end_token_ids = frozenset(ends if params.ignore_eos else (*ends, *eos_token_ids))
        self.adjuster = adjuster
        if adjuster is None and LogitsAdjuster.is_needed(params, constraint):
            self.adjuster = LogitsAdjuster(
                params,
                self.num_prompt_tokens,
                self.end_token_ids,
                constraint,
                vocab_size=vocab_size,
            )
            self.adjuster.take_prompt(self.token_ids)
        self.num_logprobs = params.logprobs
        if self.num_logprobs is None and params.num_choices > params.n:
            self.num_logprobs = 0  # the best are chosen by them
        self.unforked: list[Request] = []
        self.num_prompt_rows = 0
        self.pool: Pool | None = None
        # One seed for its whole life, so that preemption never changes what comes next.
        self.seed = (secrets.randbits(63) if params.seed is None else params.seed) & (2**64 - 1)
        self.arrival = 0
        self.max_total_tokens = 0
        self.num_computed = 0
        self.state = RequestState.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.error: str | None = None
        self.cache_salt = cache_salt
        self.blocks = SequenceBlocks(cache_salt)
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.arrival_time = time.monotonic()
        self.first_scheduled_time: float | None = None
        self.first_token_time: float | None = None
        self.last_token_time: float | None = None
        self.finished_time: float | None = None

    def make_choices(self) -> None:
        """Make its further choices, unless there are all; before it is queued, on any thread."""
        if self.num_output_tokens:  # resumed: they are sequences of their own already
            return
        missing = range(1 + len(self.unforked), self.params.num_choices)
        self.unforked += [self.sibling(choice) for choice in missing]

    def sibling(self, choice: int) -> Request:
        """Another choice of the same request, not yet begun."""
        twin = Request(
            self.request_id,
            self.token_ids,
            self.params,
            priority=self.priority,
            cache_salt=self.cache_salt,
            stop_texts=self.stop_texts,
            adjuster=None if self.adjuster is None else self.adjuster.fork(),
        )
        twin.end_token_ids = self.end_token_ids
        twin.choice, twin.seed, twin.state = choice, self.seed, RequestState.UNFORKED
        twin.is_lead = False
        twin.arrival_time = self.arrival_time
        return twin

    def resume(self, token_ids: Sequence[int], seed: int) -> None:
        """Go on behind tokens of its output that were told elsewhere; before it is queued.

        They are computed as if it had been preempted, and its prompt gives no rows again. Raises
        ConstraintError where its constraint does not allow them.
        """
        if self.adjuster is not None:
            self.adjuster.replay(list(token_ids))
        self.token_ids += token_ids
        self.seed, self.num_prompt_rows = seed, self.num_prompt_tokens
        self.unforked, self.state = [], RequestState.WAITING

    def restart(self) -> None:
        """Forget what was computed and where: everything is computed again."""
        self.blocks = SequenceBlocks(self.cache_salt)
        self.num_computed = 0
        if self.state is RequestState.RUNNING:
            self.state = RequestState.WAITING

    @property
    def order(self) -> tuple[int, int, int]:
        """Sort key: who is served first, and who is preempted last."""
        return (self.priority, self.arrival, self.choice)

    def can_go_on(self, *, late_masks: bool) -> bool:
        """Whether its next token can be computed while steps that it is in are in flight.

        Either it is known, or those steps draw it and leave it with the executor. It is neither
        where further choices go on from the same row, behind the last token, which is never
        computed, and where the logits of the token after it are adjusted by more tokens than the
        executor can add itself (or, with `late_masks`, than it can be told of).
        """
        num_unknown = self.num_computed + 1 - len(self.token_ids)
        if num_unknown <= 0:
            return True
        if self.unforked or self.num_computed + 1 >= self.max_total_tokens:
            return False
        if self.adjuster is None:
            return True
        return num_unknown <= self.adjuster.most_unknown(late_masks=late_masks)

    @property
    def is_read_only(self) -> bool:
        """Whether only its prompt is wanted: it gets no token, and is no answer of any length."""
        return self.params.max_tokens == 0

    @property
    def wants_prompt_rows(self) -> bool:
        """Whether rows of the prompt are still to be given, beside its last."""
        if self.num_computed >= self.num_prompt_tokens:  # asked often, and mostly of these
            return False
        asked = self.params.prompt_logprobs is not None
        if self.pool is not None:
            asked = self.pool.every_row
        return asked and self.choice == 0 and self.num_prompt_rows < self.num_prompt_tokens - 1

    @property
    def reusable_tokens(self) -> int | None:
        """How much of a cached prefix may be taken; None for all.

        What is taken is not computed, so it gives no logits.
        """
        return self.num_prompt_rows if self.wants_prompt_rows else None

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_prompt_tokens

    def draw(self, row: int, position: int) -> Draw:
        """How its token at `position` is taken from a row of a step."""
        params = self.params
        return Draw(
            seed=self.seed,
            temperature=max(params.temperature, LEAST_TEMPERATURE) if params.temperature else 0.0,
            top_p=params.top_p,
            min_p=params.min_p,
            top_k=params.top_k,
            row=row,
            choice=self.choice,
            position=position,
        )

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
