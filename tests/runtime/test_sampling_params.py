"""Sampling parameters: what is out of range or of another type is refused by field."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.ir.errors import RequestError
from infc.runtime.sampling.sampling_params import (
    RECOMMENDED,
    SamplingParams,
    ignored_recommendations,
    notes_on_ignored,
    recommended_sampling,
)

NAN, INF = float("nan"), float("inf")
REFUSED: list[tuple[str, list[Any]]] = [
    ("temperature", [NAN, INF, -INF, -0.1, 1e9, 10**400, "1", None, True, [1]]),
    ("top_p", [NAN, INF, 0.0, -1.0, 1.1, "0.5", None, False]),
    ("top_k", [-1, 1.5, NAN, "3", None, True, 2**40]),
    ("min_p", [NAN, -0.1, 1.1, "0.1", None, True]),
    ("repetition_penalty", [NAN, INF, 0.0, -1.0, 101, "1", None, True]),
    ("presence_penalty", [NAN, -2.1, 2.1, "1", None, False]),
    ("frequency_penalty", [NAN, -2.1, 2.1, "1", None, False]),
    ("logit_bias", [{-1: 1}, {1: 101}, {1: NAN}, {"1": 1}, {1: "1"}, {True: 1}, 5, None, "ab"]),
    ("logit_bias", [[1, 2], [(1, 2.0), (1, 3.0)], [(1, 2, 3)]]),
    ("allowed_token_ids", [[], [-1], ["1"], 3, "3", [True]]),
    ("banned_token_ids", [[-1], ["1"], 3, "3", None, [1.0]]),
    ("seed", [1.0, "1", True, 2**64, -(2**63) - 1]),
    ("max_tokens", [0, -1, 2**63, "5", 1.5, True]),
    ("min_tokens", [-1, 2**63, "5", 1.5, True, None]),
    ("logprobs", [-1, 21, 10**6, True, 1.0, "2"]),
    ("prompt_logprobs", [-1, 21, 10**6, True, 1.0, "2"]),
    ("n", [0, 129, 10**9, True, None, 1.0]),
    ("best_of", [0, 129, True, 1.0, "2"]),
    ("stop", ["", ["a", ""], [1], 5, ["x"] * 17, "y" * 1025, {"a": 1}, None]),
    ("stop_token_ids", [[-1], [True], [1.5], ["1"], 3, "3", [2**31], None]),
    ("ignore_eos", [1, "yes", None]),
    ("skip_special_tokens", [0, "no", None]),
]


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in REFUSED for value in values]
)
def test_refused_by_field(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("best_of", {"n": 3, "best_of": 2}),
        ("min_tokens", {"min_tokens": 3, "max_tokens": 2}),
        ("allowed_token_ids", {"allowed_token_ids": [1, 2], "banned_token_ids": [2, 1]}),
    ],
)
def test_fields_that_contradict_each_other(field: str, values: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**values)
    assert caught.value.field == field


def test_lists_are_frozen_and_survive_a_replacement() -> None:
    params = SamplingParams(
        logit_bias={7: -100, 3: 1}, allowed_token_ids=[3, 7], banned_token_ids=[7], n=2, best_of=3
    )
    assert params.bias_pairs == ((3, 1.0), (7, -100.0))
    assert params.num_choices == 3
    assert dataclasses.replace(params, n=3).bias_pairs == params.bias_pairs
    assert {params: 1}[dataclasses.replace(params)] == 1
    assert params.token_fields == {
        "logit_bias": (3, 7),
        "allowed_token_ids": (3, 7),
        "banned_token_ids": (7,),
        "stop_token_ids": (),
    }


def test_no_token_may_be_asked_for_beside_those_of_the_prompt() -> None:
    assert SamplingParams(max_tokens=0, prompt_logprobs=0).max_tokens == 0


def test_ends_of_the_ranges_are_taken() -> None:
    params = SamplingParams(
        temperature=0,
        top_p=1,
        top_k=2**31 - 1,
        seed=2**64 - 1,
        max_tokens=1,
        logprobs=0,
        stop=["a", "b"],
        stop_token_ids=[0],
    )
    assert params.stop_strings == ("a", "b")
    assert params.stop_token_ids == (0,)
    assert hash(params) == hash(params)
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(seed=-1).seed == -1


def test_recommendations() -> None:
    sampled = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.1, "min_p": 0.05}
    assert recommended_sampling({**sampled, "typical_p": 0.9}) == {
        "temperature": 0.7,
        "repetition_penalty": 1.1,
        "min_p": 0.05,
    }
    # The penalty is no matter of sampling: transformers applies it to the greedy as well.
    assert recommended_sampling({**sampled, "do_sample": False}) == {"repetition_penalty": 1.1}
    assert recommended_sampling(None) == {}


def test_recommended_lists_hold_for_greedy_answers_too() -> None:
    generation = {
        "suppress_tokens": [9, 5],
        "bad_words_ids": [[7], [1, 2]],
        "sequence_bias": [[[3], -1.5], [[4, 5], 2.0], [[6], -500.0], [[3], -2.0]],
        "stop_strings": "User:",
    }
    assert recommended_sampling(generation) == {
        "banned_token_ids": [5, 7, 9],
        "logit_bias": [(3, -2.0)],
        "stop": ["User:"],
    }
    SamplingParams(**recommended_sampling(generation))
    # What concerns several tokens, or lies out of range, is not built.
    assert ignored_recommendations(generation) == {
        "bad_words_ids": [[1, 2]],
        "sequence_bias": [[[4, 5], 2.0], [[6], -500.0]],
    }
    many = {"stop_strings": [str(i) for i in range(17)]}
    assert recommended_sampling(many) == {}
    assert ignored_recommendations(many) == many


@given(
    st.dictionaries(
        st.sampled_from(
            (
                *(*RECOMMENDED, "suppress_tokens", "bad_words_ids", "sequence_bias"),
                *("stop_strings", "do_sample", "no_repeat_ngram_size"),
                *("forced_eos_token_id", "something_new"),
            )
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers(-2, 9) | st.floats(-200, 200) | st.text(),
            lambda inner: st.lists(inner, max_size=3),
        ),
    )
)
def test_whatever_is_recommended_makes_requests_that_hold(generation: dict[str, Any]) -> None:
    """And nothing that would change an answer is dropped without a word."""
    used = recommended_sampling(generation)
    SamplingParams(**used)
    told = ignored_recommendations(generation)
    assert len(notes_on_ignored(generation)) == len(told)
    sampled = bool(generation.get("do_sample"))
    for name in RECOMMENDED:
        if name in generation and (sampled or name == "repetition_penalty"):
            assert (name in used) != (name in told), name
    for name in ("suppress_tokens", "bad_words_ids", "sequence_bias", "stop_strings"):
        if generation.get(name):
            assert name in told or used.keys() & {"banned_token_ids", "logit_bias", "stop"}, name
    for name in ("forced_eos_token_id", "something_new"):
        if generation.get(name):
            assert name in told


def test_recommendations_that_are_not_built() -> None:
    sampled = {"do_sample": True, "temperature": 0.7, "min_new_tokens": 4, "typical_p": 0.5}
    assert ignored_recommendations(sampled) == {"min_new_tokens": 4, "typical_p": 0.5}
    greedy = {**sampled, "do_sample": False}
    assert ignored_recommendations(greedy) == {"min_new_tokens": 4}
    assert ignored_recommendations({"min_new_tokens": 0, "repetition_penalty": 1.1}) == {}
    beams = {"num_beams": 4, "typical_p": 0.9, "no_repeat_ngram_size": 3}
    assert ignored_recommendations(beams) == {"num_beams": 4, "no_repeat_ngram_size": 3}
    assert ignored_recommendations({**beams, "do_sample": True}) == beams
    assert ignored_recommendations(None) == {}


def test_a_key_that_is_no_token_id_is_named() -> None:
    with pytest.raises(RequestError, match="logit_bias has the key '5', which is not a token id"):
        SamplingParams(logit_bias={"5": 1})  # type: ignore[dict-item]
