"""What the logits of a step say: a token for each choice, and log-probabilities of prompts."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..faults import note_fault
from ..requests.pooling import Vector
from ..requests.request import Request, RequestState
from ..sampling.sampler import Sample
from ..sampling.token_logprobs import TokenLogprobs, prompt_logprobs, raw_logprobs
from .owners import PlannedStep, PromptRows, StepOwners
from .step import NO_TOKEN, Step, StepOutput


@dataclass(frozen=True, slots=True)
class StepResults:
    """A sample for each of a step's `sampled`, and entries for its `prompt_rows`.

    A sample is None for a request that ended while the step was in flight; there are no entries
    of its prompt either. Where a row of a prompt holds no finite value its entries are None, and
    so is every token that its request would get. So they are where reading them failed: `faults`
    says how, by the id of the request.
    """

    samples: list[Sample | None]
    prompts: list[tuple[Request, list[TokenLogprobs] | None]]
    faults: dict[str, str] = field(default_factory=dict)


def read_results(planned: PlannedStep, output: StepOutput) -> StepResults:
    """Samples and log-probabilities of what a step gave.

    What fails for one request ends that one.
    """
    owners = planned.owners
    faults = {} if output.hidden is None else _pool_rows(owners, output.hidden)
    samples = _samples(planned, output)
    prompts = [
        (rows.request, _prompt_entries(planned.step, output, rows, faults))
        for rows in owners.prompt_rows
        if rows.request.state is not RequestState.FINISHED
    ]
    failed = {request.request_id for request, entries in prompts if entries is None}
    failed |= faults.keys()
    if failed:
        samples = [
            Sample(None, error=faults.get(request.request_id))
            if sample is not None and request.request_id in failed
            else sample
            for request, sample in zip(owners.sampled, samples, strict=True)
        ]
    return StepResults(samples, prompts, faults)


def _samples(planned: PlannedStep, output: StepOutput) -> list[Sample | None]:
    """One for each of `sampled`; those who pool get no token, only whether all is well."""
    owners = planned.owners
    drawn = iter(output.tokens.tolist())
    samples: list[Sample | None] = []
    finished = RequestState.FINISHED
    for request, row in zip(owners.sampled, owners.sampled_rows, strict=True):
        token = next(drawn) if request.pool is None else NO_TOKEN
        if request.state is finished:
            samples.append(None)
        elif token != NO_TOKEN and request.num_logprobs is None:
            samples.append(Sample(token))
        else:
            samples.append(_sample(planned.step, output, request, row, token))
    return samples


def _sample(step: Step, output: StepOutput, request: Request, row: int, token: int) -> Sample:
    """The sample of a request that wants more than the token that was drawn, or got none."""
    try:
        if request.pool is not None:
            return Sample(0 if request.pool.is_finite else None)
        if token == NO_TOKEN:
            return Sample(None, error=request.adjuster.error if request.adjuster else None)
        assert request.num_logprobs is not None
        logits = output.logits[step.place(row)]
        return Sample(token, raw_logprobs(logits, token, request.num_logprobs))
    except Exception as error:
        return Sample(None, error=note_fault("sampling", error))


def _prompt_entries(
    step: Step, output: StepOutput, rows: PromptRows, faults: dict[str, str]
) -> list[TokenLogprobs] | None:
    request, first = rows.request, rows.first_position + 1
    if request.request_id in faults:
        return None
    if request.pool is not None:
        return []
    assert request.params.prompt_logprobs is not None
    place = step.place(rows.first_row)
    try:
        return prompt_logprobs(
            output.logits[place : place + rows.count],
            request.token_ids[first : first + rows.count],
            request.params.prompt_logprobs,
        )
    except Exception as error:
        faults[request.request_id] = note_fault("reading a prompt", error)
        return None


def _pool_rows(owners: StepOwners, hidden: Vector) -> dict[str, str]:
    """Hand the rows of hidden states [R, hidden_width] to the requests that pool them.

    What failed of those that cannot take them, by the id of the request.
    """
    faults: dict[str, str] = {}
    places = [(rows.request, rows.first_row, rows.count) for rows in owners.prompt_rows]
    places += [(who, row, 1) for who, row in zip(owners.sampled, owners.sampled_rows, strict=True)]
    for request, first, count in places:
        if request.pool is not None and request.state is not RequestState.FINISHED:
            try:
                request.pool.add(hidden[first : first + count])
            except Exception as error:
                faults[request.request_id] = note_fault("pooling", error)
    return faults
