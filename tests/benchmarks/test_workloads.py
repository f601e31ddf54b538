"""The peers' workloads: the same ids for all, and never the same prompt twice."""

import hashlib
import json

import pytest

from benchmarks.peers.workloads import MAX_CONTEXT, MAX_REQUESTS, WORKLOADS, Request, choose

# Of round 0. Figures of different days are comparable only as long as these stay.
DIGESTS = {
    "a": "876f0cea9116635a",
    "b": "49973bb289a165c3",
    "c8": "1bcdb9b4551530ed",
    "c32": "54a7f78eaddf54de",
    "d": "2423f72d65c17fbc",
}
SIZES = {"a": (1, 32, 128), "b": (1, 512, 1), "c8": (32, 128, 64), "c32": (32, 128, 64)}


@pytest.mark.parametrize("key", WORKLOADS)
def test_ids_stay_as_they_are(key: str) -> None:
    text = json.dumps(WORKLOADS[key].draw(0).to_json(), sort_keys=True)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == DIGESTS[key]


@pytest.mark.parametrize(("key", "size"), SIZES.items())
def test_separate_prompts(key: str, size: tuple[int, int, int]) -> None:
    request = WORKLOADS[key].draw(3)
    assert (len(request.prompts), len(request.prompts[0]), request.new) == size
    assert request.shared_prefix == 0


def test_prefix_is_shared_by_all_and_by_no_other_round() -> None:
    first, second = (WORKLOADS["d"].draw(round_) for round_ in (0, 1))
    assert first.shared_prefix == second.shared_prefix == 384
    assert {len(prompt) for prompt in first.prompts} == {400}
    assert first.prompts[0][:16] != second.prompts[0][:16]


def test_no_prompt_begins_as_another_one_did() -> None:
    # Or a cache of prefixes would have it already, in some engines and not in others.
    drawn = [w.draw(round_) for w in WORKLOADS.values() for round_ in range(20)]
    drawn += [w.warm_up for w in (WORKLOADS["a"], WORKLOADS["b"])]
    heads = [
        prompt[:16]
        for request in drawn
        for prompt in (request.prompts[:1] if request.shared_prefix else request.prompts)
    ]
    assert len(set(heads)) == len(heads)


def test_requests_fit_what_engines_plan_for() -> None:
    for workload in WORKLOADS.values():
        request = workload.draw(0)
        assert max(map(len, request.prompts)) + request.new <= MAX_CONTEXT
        assert request.concurrency <= MAX_REQUESTS


def test_request_travels_as_json() -> None:
    request = Request(((1, 2), (3,)), 5, 2)
    assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request
    assert request.new_tokens == 10


def test_letters_choose() -> None:
    assert [w.key for w in choose("ca")] == ["a", "c8", "c32"]
    with pytest.raises(ValueError, match="no workload 'x'"):
        choose("ax")


def test_keys_choose() -> None:
    assert [w.key for w in choose("c32,d,a")] == ["a", "c32", "d"]
    assert [w.key for w in choose("c,b")] == ["b", "c8", "c32"]
    with pytest.raises(ValueError, match="no workload 'c16'"):
        choose("a,c16")
