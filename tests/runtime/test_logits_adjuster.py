"""Bias, penalties and masks, and what is kept of a row, against transformers' own processors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from infc.runtime.requests.request import Request
from infc.runtime.sampling import logits_adjuster
from infc.runtime.sampling.logits_adjuster import LogitsAdjuster, TokenCounts
from infc.runtime.sampling.sampler import support
from infc.runtime.sampling.sampling_params import SamplingParams
from infc.runtime.scheduling.step_results import sample

VOCAB = 40
Row = NDArray[np.float32]

seeds = st.integers(0, 2**32 - 1)
token_lists = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30)
id_sets = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=8, unique=True)


def row_of(seed: int) -> Row:
    return (np.random.default_rng(seed).standard_normal(VOCAB) * 4).astype(np.float32)


def theirs(processor: Any, row: Row, tokens: Sequence[int]) -> Row:
    """What a processor of transformers makes of a row."""
    result: Row = processor(torch.tensor([list(tokens)]), torch.tensor(row)[None])[0].numpy()
    return result


def ours(row: Row, tokens: list[int], num_prompt: int = 1, **params: Any) -> Row:
    """What a fresh adjuster makes of it."""
    chosen = SamplingParams(**params)
    ends = frozenset(chosen.stop_token_ids)
    assert LogitsAdjuster.is_needed(chosen)
    return LogitsAdjuster(chosen, num_prompt, ends).apply(row, tokens)


@given(seeds, token_lists, st.sampled_from([0.5, 1.1, 1.7, 30.0]))
def test_repetition_penalty(seed: int, tokens: list[int], penalty: float) -> None:
    expected = theirs(RepetitionPenaltyLogitsProcessor(penalty), row_of(seed), tokens)
    got = ours(row_of(seed), tokens, len(tokens) // 2, repetition_penalty=penalty)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@given(seeds, token_lists, st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100)))
def test_logit_bias(seed: int, tokens: list[int], bias: dict[int, float]) -> None:
    assume(bias)
    processor = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    expected = theirs(processor, row_of(seed), tokens)
    np.testing.assert_allclose(ours(row_of(seed), tokens, logit_bias=bias), expected, rtol=1e-6)


@given(seeds, token_lists, id_sets)
def test_banned_tokens(seed: int, tokens: list[int], banned: list[int]) -> None:
    expected = theirs(SuppressTokensLogitsProcessor(banned), row_of(seed), tokens)
    np.testing.assert_array_equal(ours(row_of(seed), tokens, banned_token_ids=banned), expected)


@given(seeds, token_lists, id_sets)
def test_allowed_tokens(seed: int, tokens: list[int], allowed: list[int]) -> None:
    others = sorted(set(range(VOCAB)) - set(allowed))
    expected = theirs(SuppressTokensLogitsProcessor(others), row_of(seed), tokens)
    np.testing.assert_array_equal(ours(row_of(seed), tokens, allowed_token_ids=allowed), expected)


@given(seeds, token_lists, id_sets, st.integers(1, 30), st.data())
def test_min_tokens(
    seed: int, tokens: list[int], ends: list[int], least: int, data: st.DataObject
) -> None:
    prompt = data.draw(st.integers(1, len(tokens)))
    processor = MinNewTokensLengthLogitsProcessor(prompt, least, ends)
    expected = theirs(processor, row_of(seed), tokens)
    got = ours(row_of(seed), tokens, prompt, min_tokens=least, stop_token_ids=ends)
    np.testing.assert_array_equal(got, expected)


@given(seeds, token_lists, st.floats(-2, 2), st.floats(-2, 2), st.data())
def test_presence_and_frequency_count_the_output_alone(
    seed: int, tokens: list[int], presence: float, frequency: float, data: st.DataObject
) -> None:
    assume(presence or frequency)
    prompt = data.draw(st.integers(1, len(tokens)))
    row = row_of(seed)
    expected = row.astype(np.float64)
    for token, count in Counter(tokens[prompt:]).items():
        expected[token] -= count * frequency + presence
    got = ours(row, tokens, prompt, presence_penalty=presence, frequency_penalty=frequency)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@given(seeds, token_lists)
def test_all_together_in_the_written_order(seed: int, tokens: list[int]) -> None:
    """Bias, repetition, frequency and presence, masks: any other order gives another row."""
    prompt, bias, stop = 1, {tokens[-1]: -3.0, 2: 5.0}, [3]
    row = theirs(
        LogitsProcessorList(
            [
                SequenceBiasLogitsProcessor([[[t], b] for t, b in bias.items()]),
                RepetitionPenaltyLogitsProcessor(1.5),
            ]
        ),
        row_of(seed),
        tokens,
    )
    for token, count in Counter(tokens[prompt:]).items():
        row[token] -= 0.5 * count + 1.0
    row[[1, 3]] = -np.inf
    row[7:] = -np.inf
    got = ours(
        row_of(seed),
        tokens,
        prompt,
        logit_bias=bias,
        repetition_penalty=1.5,
        frequency_penalty=0.5,
        presence_penalty=1.0,
        allowed_token_ids=list(range(7)),
        banned_token_ids=[1],
        min_tokens=50,
        stop_token_ids=stop,
    )
    np.testing.assert_allclose(got, row, rtol=1e-5, atol=1e-5)


@given(token_lists, st.integers(0, 30), st.lists(st.integers(0, 30), max_size=5))
def test_counts_of_a_growing_list(tokens: list[int], start: int, stops: list[int]) -> None:
    counts = TokenCounts(start)
    for stop in [*sorted(max(start, stop) for stop in stops), max(start, len(tokens))]:
        ids, numbers = counts.update(tokens[:stop])
        expected = Counter(tokens[start:stop])
        assert dict(zip(ids.tolist(), numbers.tolist(), strict=True)) == expected


@given(
    seeds,
    st.sampled_from([0.3, 1.0, 2.5]),
    st.integers(0, VOCAB + 2),
    st.sampled_from([0.05, 0.5, 0.9, 0.99, 1.0]),
    st.sampled_from([0.0, 0.01, 0.2, 1.0]),
)
def test_what_is_kept(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    row = row_of(seed)
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(min(top_k, VOCAB))] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    expected = np.flatnonzero(np.isfinite(theirs(LogitsProcessorList(warpers), row, [0])))
    # Where a share lies within rounding of the limit, both answers are right.
    order = np.sort(row.astype(np.float64))[::-1][: top_k or VOCAB]
    shares = np.exp((order - order[0]) / temperature)
    assume(np.abs(shares.cumsum() / shares.sum() - top_p).min() > 1e-5 or top_p == 1.0)
    assume(np.abs(shares - min_p).min() > 1e-6 or min_p in (0.0, 1.0))
    chosen = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    kept = support(row, chosen)
    assert (list(range(VOCAB)) if kept is None else kept.tolist()) == expected.tolist()


class EvenOnly:
    """A constraint: tokens of the parity of the output's length."""

    def mask(self, output_ids: Sequence[int]) -> NDArray[np.bool_]:
        allowed: NDArray[np.bool_] = np.arange(VOCAB) % 2 == len(output_ids) % 2
        return allowed

    def fork(self) -> EvenOnly:
        return EvenOnly()


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_a_constraint_masks_before_sampling(temperature: float) -> None:
    chosen = SamplingParams(temperature=temperature, seed=1)
    request = Request("r", [5, 6], chosen, constraint=EvenOnly())
    for turn in range(20):
        token = sample(row_of(turn), request).token_id
        assert token is not None
        assert token % 2 == turn % 2
        request.token_ids.append(token)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_with_nothing_left_fails_alone(temperature: float) -> None:
    chosen = SamplingParams(
        temperature=temperature, allowed_token_ids=[4], stop_token_ids=[4], min_tokens=1
    )
    requests = [Request("a", [1], chosen), Request("b", [1], SamplingParams())]
    tokens = [sample(row_of(0), request).token_id for request in requests]
    assert tokens == [None, int(row_of(0).argmax())]


def test_logprobs_are_of_the_row_as_it_came() -> None:
    row = row_of(3)
    best = int(row.argmax())
    request = Request("r", [1], SamplingParams(banned_token_ids=[best], logprobs=1))
    chosen = sample(row, request)
    assert chosen.logprobs is not None
    assert chosen.logprobs.top[0][0] == best != chosen.token_id
    assert chosen.logprobs.rank == 2
    assert np.array_equal(row, row_of(3)), "the row itself is not touched"


@pytest.mark.parametrize(
    "params",
    [SamplingParams(), SamplingParams(temperature=1.0, top_k=5, top_p=0.5, min_p=0.1, logprobs=2)],
)
def test_plain_requests_have_nothing_to_adjust(params: SamplingParams) -> None:
    assert Request("r", [1], params).adjuster is None


@given(seeds, token_lists, st.data())
def test_long_lists_do_what_short_ones_do(
    seed: int, tokens: list[int], data: st.DataObject
) -> None:
    """As whole rows they are faster, and change the same entries to the same numbers."""
    banned, allowed = data.draw(id_sets), data.draw(st.none() | id_sets)
    assume(allowed is None or set(allowed) - set(banned))
    params = SamplingParams(
        logit_bias=data.draw(st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-9, 9))),
        banned_token_ids=banned,
        allowed_token_ids=allowed,
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.7])),
    )
    row = row_of(seed)
    expected = row.copy()
    for token, bias in params.bias_pairs:
        expected[token] += np.float32(bias)
    for token in set(tokens) if params.repetition_penalty != 1.0 else ():
        scores, penalty = expected[[token]], params.repetition_penalty
        expected[[token]] = np.where(scores < 0, scores * penalty, scores / penalty)
    for token in range(VOCAB):
        if token in banned or (allowed is not None and token not in allowed):
            expected[token] = -np.inf
    first = LogitsAdjuster(params, 1, ())
    twin = first.fork()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logits_adjuster, "_DENSE", data.draw(st.sampled_from([0, 16, 10**6])))
        for adjuster in (first, twin, first):
            assert np.array_equal(adjuster.apply(row, tokens), expected)
