"""What the logits of a step say: a token for each choice, and log-probabilities of prompts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .outputs import TokenLogprobs
from .pooling import pool_rows
from .sampler import Sample, sample_rows
from .step import PromptRows, Step
from .token_logprobs import prompt_logprobs
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
    """Samples and log-probabilities of a step's logits [R, V]."""
    pool_rows(step)
    samples = _samples(logits, step)
    prompts = [_prompt_logprobs(logits, rows) for rows in step.prompt_rows]
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
    if step.hidden is None:
        return sample_rows(_sampled(logits, step), step.sampled)
    others = [
        pair for pair in zip(step.sampled, step.sampled_rows, strict=True) if pair[0].pool is None
    ]
    rows = logits[np.array([row for _, row in others], np.intp)]
    fresh = iter(sample_rows(rows, [request for request, _ in others]))
    return [
        next(fresh) if request.pool is None else Sample(0 if request.pool.is_finite else None)
        for request in step.sampled
    ]


def _sampled(logits: Logits, step: Step) -> Logits:
    """One row for each of `step.sampled`: choices share a row, rows of prompts are left out."""
    if len(step.sampled) == len(logits) and not step.prompt_rows:
        return logits
    rows: Logits = logits[list(step.sampled_rows)]
    return rows


def _prompt_logprobs(logits: Logits, rows: PromptRows) -> list[TokenLogprobs] | None:
    request, first = rows.request, rows.first_position + 1
    if request.pool is not None:
        return []
    assert request.params.prompt_logprobs is not None
    return prompt_logprobs(
        logits[rows.first_row : rows.first_row + rows.count],
        request.token_ids[first : first + rows.count],
        request.params.prompt_logprobs,
    )
