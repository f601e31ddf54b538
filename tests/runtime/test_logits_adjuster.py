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
from infc.runtime.sampling.adjustments import adjusted_row, gather, packed, unpacked
from infc.runtime.sampling.logits_adjuster import ConstraintError, LogitsAdjuster, TokenCounts
from infc.runtime.sampling.sampler import support
from infc.runtime.sampling.sampling_params import SamplingParams

from .samples import Grammar, sample

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
    adjuster = LogitsAdjuster(chosen, num_prompt, ends, vocab_size=len(row))
    adjuster.take_prompt(tokens)
    return applied(adjuster, row, tokens)


def applied(adjuster: LogitsAdjuster, row: Row, tokens: list[int]) -> Row:
    entry = adjuster.adjustment(tokens, len(tokens))
    return adjusted_row(row, gather([0], [entry]), 0)


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


few_tokens = st.lists(st.integers(0, 6), max_size=20)


@given(few_tokens, st.lists(few_tokens | st.integers(0, 12), max_size=8))
def test_counts_of_an_output_that_grows_and_is_taken_back(
    prompt: list[int], changes: list[list[int] | int]
) -> None:
    distinct = sorted(set(prompt))
    places = {token: place for place, token in enumerate(distinct)}
    counts, output = TokenCounts(np.array(distinct, np.int32), places), list[int]()
    for change in changes:
        if isinstance(change, int):
            change = min(change, len(output))
            counts.remove(change)
            del output[len(output) - change :]
        else:
            counts.append(change)
            output += change
        fresh = TokenCounts(np.array(distinct, np.int32), places)
        fresh.append(output)
        for mine, new in zip(counts.arrays(), fresh.arrays(), strict=True):
            assert mine.tolist() == new.tolist(), "another order, or a token that is gone"
        ids, numbers = counts.arrays()
        assert dict(zip(ids.tolist(), numbers.tolist(), strict=True)) == {
            **dict.fromkeys(prompt, 0),
            **Counter(output),
        }
        assert counts.num_output == len(output)


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

    def rollback(self, num_tokens: int) -> None: ...

    def fork(self) -> EvenOnly:
        return EvenOnly()


@pytest.mark.parametrize("temperature", [0.0, 5.0])
def test_a_constraint_masks_before_sampling(temperature: float) -> None:
    chosen = SamplingParams(temperature=temperature, seed=1)
    request = Request("r", [5, 6], chosen, constraint=EvenOnly(), vocab_size=VOCAB)
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
    requests = [
        Request("a", [1], chosen, vocab_size=VOCAB),
        Request("b", [1], SamplingParams()),
    ]
    tokens = [sample(row_of(0), request).token_id for request in requests]
    assert tokens == [None, int(row_of(0).argmax())]


def test_logprobs_are_of_the_row_as_it_came() -> None:
    row = row_of(3)
    best = int(row.argmax())
    params = SamplingParams(banned_token_ids=[best], logprobs=1)
    request = Request("r", [1], params, vocab_size=VOCAB)
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
    """As masks they are smaller, and change the same entries to the same numbers."""
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logits_adjuster, "_DENSE", data.draw(st.sampled_from([0, 16, 10**6])))
        first = LogitsAdjuster(params, 1, (), vocab_size=VOCAB)
        first.take_prompt(tokens)
        twin = first.fork()
        for adjuster in (first, twin, first):
            assert np.array_equal(applied(adjuster, row, tokens), expected)


@given(st.integers(1, 200), seeds)
def test_a_mask_has_a_bit_for_each_token(size: int, seed: int) -> None:
    allowed = np.random.default_rng(seed).random(size) < 0.5
    mask = packed(allowed)
    assert mask.shape == (-(-size // 32),)
    assert [bool(int(mask[i // 32]) >> i % 32 & 1) for i in range(size)] == allowed.tolist()
    assert np.array_equal(unpacked(mask, size), allowed)


@given(
    st.lists(st.tuples(few_tokens | st.integers(0, 12), st.booleans()), max_size=8), st.booleans()
)
def test_going_back_leaves_no_trace(
    changes: list[tuple[list[int] | int, bool]], as_words: bool
) -> None:
    """The rows are those of another that never saw what was taken back."""
    params = SamplingParams(
        repetition_penalty=1.3,
        frequency_penalty=0.4,
        presence_penalty=-0.2,
        banned_token_ids=[4],
        min_tokens=5,
        stop_token_ids=[1, 2],
    )

    def make() -> LogitsAdjuster:
        made = LogitsAdjuster(params, 2, (1, 2), Grammar(VOCAB, as_words), vocab_size=VOCAB)
        made.take_prompt([3, 1])
        return made

    adjuster, tokens, row = make(), [3, 1], row_of(0)
    for change, asks in changes:
        if isinstance(change, int):
            del tokens[max(2, len(tokens) - change) :]
            adjuster.rewind(len(tokens) - 2)
        else:
            tokens += change
        if asks:  # else what it knows may be less, or more, than the next change takes back
            assert applied(adjuster, row, tokens).tobytes() == (
                applied(make(), row, tokens).tobytes()
            )
    assert applied(adjuster, row, tokens).tobytes() == applied(make(), row, tokens).tobytes()


@pytest.mark.parametrize("known", [3, 5])
def test_the_executor_counts_a_token_that_only_it_knows(known: int) -> None:
    params = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.3)
    tokens, row = [5, 6, 7, 7, 8], row_of(1)
    for carried in (5, 7, 8, 30):
        whole = [*tokens[:known], carried]
        adjuster = LogitsAdjuster(params, 2, ())
        adjuster.take_prompt(tokens)
        assert adjuster.most_unknown(late_masks=False) == 1
        entry = gather([0], [adjuster.adjustment(tokens[:known], known + 1)])
        fresh = LogitsAdjuster(params, 2, ())
        fresh.take_prompt(tokens)
        assert np.array_equal(adjusted_row(row, entry, 0, carried), applied(fresh, row, whole))


def test_an_output_that_is_there_already_is_as_if_it_had_come_token_by_token() -> None:
    params, row = SamplingParams(frequency_penalty=0.7), row_of(0)

    def make() -> LogitsAdjuster:
        return LogitsAdjuster(params, 2, (), Grammar(VOCAB), vocab_size=VOCAB)

    came, tokens = make(), [3, 1]
    for _ in range(5):
        tokens.append(int(applied(came, row, tokens).argmax()))
    there = make()
    there.replay(tokens[2:])
    assert applied(there, row, tokens).tobytes() == applied(came, row, tokens).tobytes()
    fresh = make()
    fresh.replay(tokens[2:])
    for adjuster in (fresh, there):  # one that has not been asked about all of it, and one that has
        adjuster.rewind(2)
        assert applied(adjuster, row, tokens[:4]).tobytes() == (
            applied(make(), row, tokens[:4]).tobytes()
        )
    wrong = int(applied(make(), row, [3, 1]).argmin())
    with pytest.raises(ConstraintError, match=f"Grammar does not allow token {wrong} at place 0"):
        make().replay([wrong, 0])
