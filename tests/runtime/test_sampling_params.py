"""Sampling parameters: what is out of range or of another type is refused by field."""

from __future__ import annotations

from typing import Any

import pytest

from infc.ir.errors import RequestError
from infc.runtime.sampling_params import SamplingParams, ignored_recommendations

NAN, INF = float("nan"), float("inf")
REFUSED: list[tuple[str, list[Any]]] = [
    ("temperature", [NAN, INF, -INF, -0.1, 1e9, 10**400, "1", None, True, [1]]),
    ("top_p", [NAN, INF, 0.0, -1.0, 1.1, "0.5", None, False]),
    ("top_k", [-1, 1.5, NAN, "3", None, True, 2**40]),
    ("seed", [1.0, "1", True, 2**64, -(2**63) - 1]),
    ("max_tokens", [0, -1, 2**63, "5", 1.5, True]),
    ("logprobs", [-1, 21, 10**6, True, 1.0, "2"]),
    ("n", [0, 2, 10**9, True, None, 1.0]),
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


def test_recommendations_that_are_not_built() -> None:
    sampled = {"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.1, "min_p": 0.05}
    assert ignored_recommendations(sampled) == {"repetition_penalty": 1.1, "min_p": 0.05}
    greedy = {**sampled, "do_sample": False}
    assert ignored_recommendations(greedy) == {"repetition_penalty": 1.1}
    assert ignored_recommendations({"repetition_penalty": 1.0, "top_k": 50}) == {}
    beams = {"num_beams": 4, "typical_p": 0.9, "no_repeat_ngram_size": 3}
    assert ignored_recommendations(beams) == {"num_beams": 4, "no_repeat_ngram_size": 3}
    assert ignored_recommendations({**beams, "do_sample": True}) == beams
    assert ignored_recommendations(None) == {}
