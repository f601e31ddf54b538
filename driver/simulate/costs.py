"""What steps, requests and tokens cost: of a replica by the roofline, of a front as measured."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, replace

from ...ir.manifest import Limits
from ...ir.program import Program
from ...ir.roofline import Ceilings, Roofline, StepShape


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCosts:
    """The seconds of a step, as a sum of what its tokens, sequences and contexts take.

    `tokens` and `seconds` are places of a line through the time of steps with one prompt of so
    many tokens. `sequence` is what each that generates takes more: its row of logits, and its
    draw. `decode_context` is what it takes for each token that is stored, and `prompt_context`
    what a token of a prompt takes for each that was stored before the step, which many read at
    once. `request` is what one takes that begins, beside its tokens.
    """

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    sequence: float
    decode_context: float
    prompt_context: float
    request: float = 0.0

    def step(
        self,
        decoding: int,
        decode_context: int,
        prompt: int = 0,
        prompt_context: int = 0,
        begun: int = 0,
    ) -> float:
        """Of `decoding` sequences with so many stored tokens in all, and tokens of prompts.

        `prompt_context` is the sum over those tokens of what was stored before the step, `begun`
        counts prompts that end in it.
        """
        attention = self.decode_context * decode_context + self.prompt_context * prompt_context
        own = self.sequence * decoding + self.request * begun
        return self._at(decoding + prompt) + own + attention

    def _at(self, tokens: int) -> float:
        """On the line, which goes on behind its last place."""
        if len(self.tokens) == 1:
            return self.seconds[0]
        right = min(max(1, bisect_right(self.tokens, tokens)), len(self.tokens) - 1)
        low, high = self.tokens[right - 1], self.tokens[right]
        share = (tokens - low) / (high - low)
        return self.seconds[right - 1] + share * (self.seconds[right] - self.seconds[right - 1])

    def slower(self, factor: float) -> StepCosts:
        """Of a machine that takes so many times as long."""
        return replace(
            self,
            seconds=tuple(each * factor for each in self.seconds),
            sequence=self.sequence * factor,
            request=self.request * factor,
            decode_context=self.decode_context * factor,
            prompt_context=self.prompt_context * factor,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontCosts:
    """CPU seconds of a front, which is one thread: measured with the bundled model.

    A streamed token took 27 µs, the rest of its request included; choosing one of R replicas by
    prefix 4 µs and 0.65 µs for each (`benchmarks/RESULTS.md`).
    """

    token: float = 27e-6
    route: float = 4e-6
    route_replica: float = 0.65e-6

    def routing(self, num_replicas: int) -> float:
        """Of one request."""
        return self.route + self.route_replica * num_replicas


def roofline_costs(program: Program, limits: Limits, ceilings: Ceilings) -> StepCosts:
    """At the ceilings of a machine: no replica is faster, and small models are much slower."""
    roofline = Roofline(program, ceilings)
    places, rows = token_places(limits.step_tokens), limits.logit_rows
    bare = [roofline.step_seconds(StepShape.of([(t, t)], rows=1)) for t in places]
    costs = StepCosts(
        tokens=places, seconds=tuple(bare), sequence=0.0, decode_context=0.0, prompt_context=0.0
    )
    batch = max(1, min(limits.max_sequences, rows, limits.step_tokens))
    context = max(2, limits.max_context // 2)
    apart = StepShape.of([(1, 1)] * batch)
    more = roofline.step_seconds(apart) - costs.step(batch, 0)
    costs = replace(costs, sequence=max(0.0, more / batch))
    decode = StepShape.of([(1, context)] * batch)
    more = roofline.step_seconds(decode) - roofline.step_seconds(apart)
    costs = replace(costs, decode_context=max(0.0, more / (batch * (context - 1))))
    queries = max(1, min(limits.step_tokens, context // 2))
    first, second = (StepShape.of([(queries, n)], rows=1) for n in (queries, context))
    more = roofline.step_seconds(second) - roofline.step_seconds(first)
    pairs = queries * max(1, context - queries)
    return replace(costs, prompt_context=max(0.0, more / pairs))


def token_places(step_tokens: int) -> tuple[int, ...]:
    """Where the line of a step's tokens has its places: powers of two, and what fits at most."""
    places, tokens = [], 1
    while tokens < step_tokens:
        places.append(tokens)
        tokens *= 2
    return (*places, step_tokens)
