"""Speed of an artifact through the engine: tokens a second, and the share of the host."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..ir.errors import UsageError

if TYPE_CHECKING:
    from ..ir.artifact import Artifact
    from ..runtime.executors.base import Executor
    from ..runtime.llm import LLM
    from ..runtime.step import Step


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over the rounds. Rates in tokens a second over the whole batch, times in seconds.

    `host_step_microseconds` is what a decoding step takes outside the executor;
    `at_once` sequences run, and what the batch has more of waits.
    """

    prompt_tokens: int
    new_tokens: int
    batch: int
    rounds: int
    threads: int
    at_once: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    first_token_seconds: float
    host_step_microseconds: float


def measure_speed(
    artifact: Artifact,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 64,
    batch: int = 1,
    rounds: int = 3,
    **engine: Any,
) -> Speed:
    """Generates from random prompts, after one round that does not count.

    Raises UsageError where prompt and answer do not fit into the context, CapacityError where
    the memory is too little.
    """
    from ..runtime.llm import LLM

    with LLM(artifact, prefix_reuse=False, **engine) as llm:
        if prompt_tokens + new_tokens > (limit := llm.engine.plan.limits.max_context):
            raise UsageError(
                f"{prompt_tokens} prompt tokens and {new_tokens} new ones do not fit into {limit}",
                hint="take fewer of either, or compile with a larger runtime.max_context",
            )
        timed = _TimedExecutor(llm.engine.executor)
        llm.engine.executor = timed
        shape = (prompt_tokens, new_tokens, batch)
        results = [_round(llm, timed, shape, seed) for seed in range(rounds + 1)][1:]
        threads = llm.engine.plan.num_threads
        at_once = llm.engine.plan.limits.max_running
    first, decode, host = (statistics.median(r[i] for r in results) for i in range(3))
    return Speed(
        prompt_tokens,
        new_tokens,
        batch,
        rounds,
        threads,
        at_once,
        prefill_tokens_per_second=prompt_tokens * batch / first,
        decode_tokens_per_second=(new_tokens - 1) * batch / decode if new_tokens > 1 else 0.0,
        first_token_seconds=first,
        host_step_microseconds=host * 1e6,
    )


class _TimedExecutor:
    """An executor that counts the time spent in it."""

    def __init__(self, inner: Executor) -> None:
        self._inner = inner
        self.seconds = 0.0

    def run(self, step: Step) -> Any:
        start = time.perf_counter()
        logits = self._inner.run(step)
        self.seconds += time.perf_counter() - start
        return logits

    def close(self) -> None:
        self._inner.close()


def _round(
    llm: LLM, timed: _TimedExecutor, shape: tuple[int, int, int], seed: int
) -> tuple[float, float, float]:
    """Seconds until every request has its first token, from there to the end, host's of a step."""
    from ..runtime.sampling_params import SamplingParams

    prompt_tokens, new_tokens, batch = shape
    engine, draw = llm.engine, random.Random(seed)
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    begun: set[str] = set()
    start = time.perf_counter()
    for index in range(batch):
        prompt = [draw.randrange(engine.vocab_size) for _ in range(prompt_tokens)]
        engine.add_request(f"{seed}-{index}", prompt, params)
    while len(begun) < batch and engine.has_unfinished:
        begun.update(output.request_id for output in engine.step())
    middle, inside, steps = time.perf_counter(), timed.seconds, 0
    while engine.has_unfinished:
        engine.step()
        steps += 1
    decode = time.perf_counter() - middle
    host = (decode - (timed.seconds - inside)) / steps if steps else 0.0
    return middle - start, decode, host
