"""What the logits of a step say: a token for each choice, and log-probabilities of prompts."""

from __future__ import annotations

from dataclasses import dataclass

from .outputs import TokenLogprobs
from .pooling import pool_rows
from .sampler import Sample, sample
from .step import NO_TOKEN, PromptRows, Step
from .token_logprobs import prompt_logprobs, raw_logprobs
from .top_tokens import Logits


@dataclass(frozen=True, slots=True)
class StepResults:
    """A sample for each of the step's `sampled`, and entries for each of its `prompt_rows`.

    Where a row of a prompt holds no finite value its entries are None, and so is every token
    that its request would get.
    """

    samples: list[Sample]
    prompts: list[list[TokenLogprobs] | None]


def read_results(logits: Logits, step: Step) -> StepResults:
    """Samples and log-probabilities of what a step gave: its logits [L, V], and `step.tokens`."""
    pool_rows(step)
    samples = _samples(logits, step)
    prompts = [_prompt_logprobs(logits, step, rows) for rows in step.prompt_rows]
    if None in prompts:
        failed = {
            rows.request.request_id
            for rows, entries in zip(step.prompt_rows, prompts, strict=True)
            if entries is None
        }
        samples = [
            Sample(None) if request.request_id in failed else sample
            for request, sample in zip(step.sampled, samples, strict=True)
        ]
    return StepResults(samples, prompts)


def _samples(logits: Logits, step: Step) -> list[Sample]:
    """One for each of `step.sampled`; those who pool get no token, only whether all is well."""
    drawn = iter(step.tokens.tolist())
    samples = []
    for request, row in zip(step.sampled, step.sampled_rows, strict=True):
        if request.pool is not None:
            samples.append(Sample(0 if request.pool.is_finite else None))
        elif request.adjuster is not None:
            samples.append(sample(logits[step.place(row)], request))
        elif (token := next(drawn)) == NO_TOKEN:
            samples.append(Sample(None))
        elif request.num_logprobs is None:
            samples.append(Sample(token))
        else:
            raw = logits[step.place(row)]
            samples.append(Sample(token, raw_logprobs(raw, token, request.num_logprobs)))
    return samples


def _prompt_logprobs(logits: Logits, step: Step, rows: PromptRows) -> list[TokenLogprobs] | None:
    request, first = rows.request, rows.first_position + 1
    if request.pool is not None:
        return []
    assert request.params.prompt_logprobs is not None
    place = step.place(rows.first_row)
    return prompt_logprobs(
        logits[place : place + rows.count],
        request.token_ids[first : first + rows.count],
        request.params.prompt_logprobs,
    )
