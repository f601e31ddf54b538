"""Whether a request can ever be served, and how long it may become."""

from __future__ import annotations

from dataclasses import dataclass

from ...ir.errors import RequestError
from ...ir.sizes import format_count
from ..requests.request import Request
from .kv_cache import KvCache


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """What one step and the whole scheduler may hold.

    `step_tokens` tokens and `logit_rows` rows of logits a step, `max_sequences` sequences
    running, `max_context` tokens a sequence (prompt and output), `max_waiting` requests queued.
    `compiled_context` is what `max_context` may be raised to without compiling again, where it
    was lowered. `itl_target_seconds` is how long a step may take that somebody waits for: prompts
    are cut so that it does (`Pacer`); None for as long as it takes.
    """

    step_tokens: int
    max_sequences: int
    logit_rows: int
    max_context: int
    max_waiting: int = 4096
    compiled_context: int | None = None
    itl_target_seconds: float | None = None

    @property
    def max_running(self) -> int:
        """Sequences that run at once: each gets a token and a row of logits in every step."""
        return min(self.max_sequences, self.logit_rows, self.step_tokens)


def max_total_tokens(request: Request, limits: SchedulerLimits, kv: KvCache) -> int:
    """Prompt and output together; raises RequestError where they can never fit."""
    limit, prompt = limits.max_context, request.num_prompt_tokens
    wanted = request.params.max_tokens
    if prompt == 0:
        raise RequestError("the prompt has no tokens", field="prompt")
    if prompt > limit or (prompt == limit and wanted != 0):
        raise RequestError(
            f"the prompt has {format_count(prompt, 'token')}, the limit for prompt"
            f" and output together is {limit}",
            field="prompt",
            hint=f"shorten it, or {_more_context(limits)}",
        )
    total = limit if wanted is None else prompt + wanted
    if total > limit:
        raise RequestError(
            f"prompt ({prompt}) and max_tokens ({wanted}) exceed the limit of {limit} tokens",
            field="max_tokens",
            hint=f"use at most {limit - prompt}",
        )
    if prompt + request.params.min_tokens > total:
        raise RequestError(
            f"prompt ({prompt}) and min_tokens ({request.params.min_tokens}) exceed the limit"
            f" of {total} tokens",
            field="min_tokens",
            hint=f"use at most {total - prompt}",
        )
    # The last token is never read back, unless it is the prompt's.
    if not kv.holds_alone(max(prompt, total - 1)):
        raise RequestError(
            f"{total} tokens do not fit into the KV cache",
            field="max_tokens",
            hint="request fewer tokens, or increase the KV memory",
        )
    return total


def _more_context(limits: SchedulerLimits) -> str:
    compiled = limits.compiled_context
    if compiled is None or compiled == limits.max_context:
        return "compile with a larger runtime.max_context"
    return f"give it more max_context or KV memory: compiled is {compiled}"
