"""The sampler: greedy ties, supports of top-k and top-p, seeds, log-probabilities."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from infc.runtime.requests.request import Request
from infc.runtime.sampling.sampler import draw, support, uniform
from infc.runtime.sampling.sampling_params import SamplingParams
from infc.runtime.sampling.token_logprobs import prompt_logprobs, raw_logprobs
from infc.runtime.sampling.top_tokens import greatest, greatest_values, ranked

from .samples import sample

Row = NDArray[np.float32]

# Few values, so that ties are common; minus infinity is a forbidden token.
rows = st.lists(
    st.sampled_from([-float("inf"), -2.0, 0.0, 0.5, 0.5, 3.0]), min_size=1, max_size=40
).map(lambda values: np.array([*values, 0.25], np.float32))
params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([1e-6, 0.3, 1.0, 5.0]),
    top_k=st.integers(0, 45),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]),
)


def request(chosen: SamplingParams, num_tokens: int = 3, seed: int = 0) -> Request:
    made = Request("r", [0] * num_tokens, chosen)
    made.seed = seed
    return made


def kept(row: Row, chosen: SamplingParams) -> list[int]:
    """The support by its definition, over a whole sort."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    order = order[: chosen.top_k or len(row)]
    if chosen.top_p == 1.0:
        return sorted(order)
    wide = row[order].astype(np.float64)
    shares = np.exp((wide - wide.max()) / chosen.temperature)
    shares /= shares.sum()
    total, count = 0.0, 0
    while count < len(order) and total < chosen.top_p - 1e-12:
        total += float(shares[count])
        count += 1
    return sorted(order[: max(1, count)])


@given(rows, st.integers(1, 50))
def test_ranked_is_a_stable_sort(row: Row, count: int) -> None:
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    assert ranked(row, count).tolist() == order[:count]


@given(rows, params)
def test_support_is_what_top_k_and_top_p_say(row: Row, chosen: SamplingParams) -> None:
    got = support(row, chosen)
    assert (list(range(len(row))) if got is None else got.tolist()) == kept(row, chosen)


@given(st.integers(0, 2**32 - 1), st.integers(1, 5000), st.integers(1, 300), st.booleans())
def test_long_rows_are_searched_like_short_ones(
    seed: int, size: int, count: int, ties: bool
) -> None:
    rng = np.random.default_rng(seed)
    row: Row = rng.standard_normal(size).astype(np.float32)
    row = row.round(1) if ties else row
    order = sorted(range(size), key=lambda i: (-row[i], i))[:count]
    assert greatest(row, count).tolist() == sorted(order)
    assert greatest_values(row, count).tolist() == [row[i] for i in order]


def test_support_of_a_flat_row_needs_more_than_the_first_candidates() -> None:
    row = np.random.default_rng(0).standard_normal(5000).astype(np.float32) * 0.01
    chosen = SamplingParams(temperature=1.0, top_p=0.9)
    got = support(row, chosen)
    assert got is not None
    assert got.tolist() == kept(row, chosen)
    assert 4000 < len(got) < 4700


@given(rows, params, st.floats(0, 1, exclude_max=True))
def test_draw_stays_in_the_support_and_is_possible(
    row: Row, chosen: SamplingParams, u: float
) -> None:
    token = draw(row, chosen, u)
    assert token in kept(row, chosen)
    assert row[token] > -np.inf


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_draw_at_the_ends(u: float) -> None:
    row = np.array([-np.inf, 1.0, 1.0, -np.inf], np.float32)
    assert draw(row, SamplingParams(temperature=1.0), u) == (1 if u < 0.5 else 2)


def test_shares_are_those_of_the_softmax() -> None:
    row = np.log(np.array([0.5, 0.2, 0.2, 0.1])).astype(np.float32)
    chosen = SamplingParams(temperature=2.0, top_k=3)
    expected = np.sqrt([0.5, 0.2, 0.2]) / np.sqrt([0.5, 0.2, 0.2]).sum()
    drawn = [draw(row, chosen, uniform(9, choice=0, position=i)) for i in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn, minlength=4)[:3] / 4000, expected, atol=0.03)


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-46, 5e-324])
@pytest.mark.parametrize("rest", [{}, {"top_p": 0.5}, {"top_k": 2}, {"min_p": 0.5}], ids=str)
def test_a_temperature_of_almost_nothing_is_greedy(
    temperature: float, rest: dict[str, float]
) -> None:
    row = np.array([1.0, 7.0, 6.9999995, -float("inf"), -3.0], np.float32)
    chosen = SamplingParams(temperature=temperature, **rest)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for u in (0.0, 0.3, 0.999):
            assert draw(row, chosen, u) == 1


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = np.array([[0, 2, 2, 1], [5, 5, 5, 5]], np.float32)
    assert [sample(row, request(SamplingParams())).token_id for row in logits] == [1, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_without_a_finite_maximum_fail(bad: float) -> None:
    logits = np.array([[0, 2, 1], [0, bad, 1], [-np.inf] * 3, [3, 2, 1]], np.float32)
    for chosen in (SamplingParams(), SamplingParams(temperature=1e-3)):
        assert [sample(row, request(chosen)).token_id for row in logits] == [1, None, None, 0]


# Frozen: other numbers would change what every seed gives.
GOLDEN = [0.3035680343067586, 0.9002684531124185, 0.35811448402596147, 0.23494158814525556]


def test_random_key_is_written_down() -> None:
    got = [uniform(1, choice=0, position=0), uniform(1, choice=0, position=1)]
    got += [uniform(1, choice=1, position=0), uniform(2**64 - 1, choice=0, position=0)]
    assert got == GOLDEN
    assert len(set(got)) == 4


def test_seeds_repeat_and_differ() -> None:
    logits = np.zeros(1000, np.float32)
    chosen = SamplingParams(temperature=1.0)

    def tokens(seed: int) -> list[int | None]:
        return [
            sample(logits, request(chosen, num_tokens=n, seed=seed)).token_id for n in range(1, 30)
        ]

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)
    assert len(set(tokens(3))) > 20
    assert Request("r", [0], chosen).seed != Request("r", [0], chosen).seed


@given(rows, st.integers(0, 20))
def test_logprobs_are_of_the_raw_logits(row: Row, count: int) -> None:
    entry = raw_logprobs(row, 0, count)
    wide = row.astype(np.float64)
    expected = wide - wide.max() - np.log(np.exp(wide - wide.max()).sum())
    assert entry.logprob == pytest.approx(expected[0], abs=1e-12)
    assert [i for i, _ in entry.top] == (ranked(row, count).tolist() if count else [])
    assert [p for _, p in entry.top] == pytest.approx([expected[i] for i, _ in entry.top])
    for token in range(len(row)):
        assert ranked(row, len(row))[raw_logprobs(row, token, 0).rank - 1] == token


def test_logprobs_of_a_prompt() -> None:
    logits = np.random.default_rng(1).standard_normal((3, 20)).astype(np.float32)
    assert prompt_logprobs(logits, [4, 19, 0], 2) == [
        raw_logprobs(row, token, 2) for row, token in zip(logits, [4, 19, 0], strict=True)
    ]
    assert prompt_logprobs(logits[:0], [], 2) == []
    logits[1, 7] = np.nan
    assert prompt_logprobs(logits, [4, 19, 0], 2) is None


def test_draws_of_a_long_row_have_the_shares_of_its_softmax() -> None:
    row = np.random.default_rng(2).standard_normal(1000).astype(np.float32) * 2
    chosen = SamplingParams(temperature=1.3)
    shares = np.exp(row.astype(np.float64) / 1.3)
    ends = (shares / shares.sum()).cumsum()
    for i in range(2000):
        u = uniform(4, choice=1, position=i)
        token = draw(row, chosen, u)
        assert (ends[token - 1] if token else 0.0) - 1e-6 <= u <= ends[token] + 1e-6
