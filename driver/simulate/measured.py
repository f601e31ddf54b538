"""What steps of an engine take on this machine, measured with requests."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from ...runtime.sampling.sampling_params import SamplingParams
from .costs import StepCosts, token_places

if TYPE_CHECKING:
    from ...runtime.engine import Engine

_ROUNDS = 5
_DECODE_STEPS = 16
_SHORT = 8  # tokens of a prompt
_LONG = 1024
_FEW = 8  # sequences with a long context


def measure_costs(engine: Engine, clock: Callable[[], float] = time.perf_counter) -> StepCosts:
    """The costs of steps of an engine that does nothing else.

    With `time.process_time` for a clock, they are those of an engine with one thread on a machine
    where nothing else runs, which this one need not be.
    """
    limits, measure = engine.plan.limits, _Measurement(engine, clock)
    room = limits.max_context - _DECODE_STEPS - 2
    places = tuple(n for n in token_places(limits.step_tokens) if n <= room)
    measure.prompt(places[-1])  # whatever the first step does that others do not
    # A request that begins is also put into the step, and told of as one that has ended.
    one, begun = measure.decode(1, _SHORT), measure.prompt(1)
    request = max(0.0, begun - one)
    seconds = [min(one, begun)]
    for tokens in places[1:]:  # noise says at times that more tokens are quicker
        seconds.append(max(measure.prompt(tokens) - request, seconds[-1]))
    costs = StepCosts(
        tokens=places,
        seconds=tuple(seconds),
        sequence=0.0,
        decode_context=0.0,
        prompt_context=0.0,
    )
    few, long = min(_FEW, limits.max_running), min(_LONG, room)
    added = few * (long - _SHORT)
    per_token = max(0.0, measure.decode(few, long) - measure.decode(few, _SHORT)) / added
    batch, stored = limits.max_running, _SHORT + _DECODE_STEPS // 2
    more = measure.decode(batch, _SHORT) - costs.step(batch, 0) - per_token * batch * stored
    last, twice = places[-1], min(2 * places[-1], room)
    per_pair = 0.0
    if twice > last:
        rest = twice - last
        further = measure.prompt(twice) - request - seconds[-1]
        per_pair = (further - costs.step(0, 0, rest)) / (last * rest)
    return StepCosts(
        tokens=places,
        seconds=tuple(seconds),
        sequence=max(0.0, more / batch),
        decode_context=per_token,
        prompt_context=max(0.0, per_pair),
        request=request,
    )


class _Measurement:
    """Runs requests of random tokens, so that no prompt is known."""

    def __init__(self, engine: Engine, clock: Callable[[], float]) -> None:
        self._engine, self._clock = engine, clock
        self._draw = random.Random(1)
        self._number = 0

    def decode(self, batch: int, context: int) -> float:
        """Seconds of a step that gives each of so many sequences a token: of quick ones."""
        self._add(batch, context, _DECODE_STEPS)
        times = self._run()
        # At the end all have begun, and none is done before the last. Steps that took longer were
        # interrupted by what else runs on this machine.
        return statistics.quantiles(times[-_DECODE_STEPS // 2 - 1 : -1], n=4)[0]

    def prompt(self, length: int) -> float:
        """Seconds of computing a prompt as a whole: the least of some, not interrupted."""
        taken = []
        for _ in range(_ROUNDS):
            self._add(1, length, 1)
            taken.append(sum(self._run()))
        return min(taken)

    def _add(self, batch: int, length: int, tokens: int) -> None:
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        for _ in range(batch):
            prompt = [self._draw.randrange(self._engine.vocab_size) for _ in range(length)]
            self._number += 1
            self._engine.add_request(f"plan-{self._number}", prompt, params)

    def _run(self) -> list[float]:
        times = []
        while self._engine.has_unfinished:
            begun = self._clock()
            self._engine.step()
            times.append(self._clock() - begun)
        return times
