"""Simulated fleets: nothing is lost, order is kept, and times are those that theory predicts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infc.driver.simulate.cache import SimulatedCache
from infc.driver.simulate.costs import FrontCosts, StepCosts
from infc.driver.simulate.fleet import Autoscaling, Fleet, simulate
from infc.driver.simulate.outcome import Times
from infc.driver.simulate.planned import saturation
from infc.driver.simulate.replica import ReplicaLimits, SimulatedReplica, Stream
from infc.driver.simulate.workload import Asked, Mix, Workload, random_workload
from infc.ir.errors import CapacityError, UsageError

COSTS = StepCosts(
    tokens=(1, 64, 256),
    seconds=(0.004, 0.008, 0.03),
    sequence=1e-5,
    decode_context=1e-8,
    prompt_context=1e-9,
)
LIMITS = ReplicaLimits(max_running=16, step_tokens=256, num_blocks=400, block_size=16)
FREE = FrontCosts(token=0.0, route=0.0, route_replica=0.0)
SHARED = Mix(prompt_tokens=200, output_tokens=16, num_prefixes=16, prefix_tokens=160)


def workload(rate: float, count: int, mix: Mix = SHARED, seed: int = 3) -> Workload:
    """Requests at random times."""
    return random_workload(rate, count, mix, block_size=LIMITS.block_size, seed=seed)


@st.composite
def fleets(draw: st.DrawFn) -> Fleet:
    """Any fleet, the tight ones included."""
    replicas = draw(st.integers(1, 5))
    scaled = draw(st.booleans())
    scaling = Autoscaling(
        least=1, most=6, target=draw(st.sampled_from([1.0, 8.0])), period_seconds=0.5,
        start_seconds=0.7, down_seconds=2.0,
    )  # fmt: skip
    return Fleet(
        replicas=replicas,
        limits=ReplicaLimits(
            max_running=draw(st.sampled_from([1, 3, 16])),
            step_tokens=draw(st.sampled_from([16, 100])),
            num_blocks=draw(st.sampled_from([24, 60, 400])),
            block_size=16,
        ),
        costs=COSTS,
        fronts=1 if scaled else draw(st.integers(1, replicas)),
        fronts_by_prefix=draw(st.booleans()),
        front_costs=draw(st.sampled_from([FREE, FrontCosts()])),
        routing=draw(st.sampled_from(["prefix", "least-loaded", "round-robin", "random"])),
        autoscaling=scaling if scaled else None,
        failure_seconds=draw(st.sampled_from([math.inf, 2.0, 0.3])),
        restart_seconds=0.1,
        seed=draw(st.integers(0, 9)),
    )


@settings(max_examples=40, deadline=None)
@given(fleets(), st.integers(0, 5), st.sampled_from([5.0, 50.0, 2000.0]))
def test_each_request_ends_once_and_seeds_decide(fleet: Fleet, seed: int, rate: float) -> None:
    mix = Mix(prompt_tokens=90, output_tokens=20, num_prefixes=seed, prefix_tokens=48)
    asked = workload(rate, 60, mix, seed)
    outcome = simulate(fleet, asked)
    assert outcome.requests == len(asked.asked)
    assert outcome.tokens == sum(each.output_tokens for each in asked.asked)
    assert 0 <= outcome.hit_tokens < outcome.prompt_tokens
    assert outcome.busy_seconds <= outcome.replica_seconds * (1 + 1e-9)
    assert outcome.front_busy <= 1 + 1e-9
    assert outcome.deaths or not outcome.moved
    if fleet.autoscaling is not None:
        assert outcome.most_replicas <= max(fleet.autoscaling.most, fleet.replicas)
    assert simulate(fleet, asked) == outcome
    assert all(0 <= t.p50 <= t.p90 <= t.p99 for t in (outcome.first_token, outcome.gap))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 300), st.integers(1, 30)), min_size=1, max_size=30), st.data()
)
def test_requests_of_a_replica_begin_in_their_order(
    lengths: list[tuple[int, int]], data: st.DataObject
) -> None:
    replica = SimulatedReplica(0, replace(LIMITS, max_running=4, step_tokens=64), COSTS)
    waiting = [
        Stream(number, Asked(0.0, prompt, output, ()))
        for number, (prompt, output) in enumerate(lengths)
    ]
    begun, done = [], []
    for number, stream in enumerate(waiting):
        replica.send(stream)
        last = number == len(waiting) - 1
        for _ in range(10**6 if last else data.draw(st.integers(0, 3))):
            if replica.begin_step() is None:
                break
            ended = replica.end_step()
            begun += [each.number for each in ended.first]
            done += [each.number for each in ended.done]
    assert begun == list(range(len(lengths)))
    assert sorted(done) == begun
    assert replica.candidate.work == 0
    assert replica.cache.num_used == 0


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_blocks_are_never_more_than_there_are(data: st.DataObject) -> None:
    cache = SimulatedCache(20)
    held: list[tuple[tuple[bytes, ...], int]] = []
    known: set[bytes] = set()
    for _ in range(30):
        ends = data.draw(st.booleans())
        if held and ends:
            digests, own = held.pop(data.draw(st.integers(0, len(held) - 1)))
            cache.free(digests, own)
        else:
            name = data.draw(st.integers(0, 3))
            digests = tuple(b"%d:%d" % (name, at) for at in range(data.draw(st.integers(0, 6))))
            total = len(digests) + data.draw(st.integers(1, 5))
            found = cache.num_found(digests)
            if cache.take(digests, found, total):
                held.append((digests, total - found - cache.store(digests, found)))
        assert 0 <= cache.num_used <= cache.num_blocks
        # What a policy was told is what is there.
        known = (known | set(cache.stored)) - set(cache.removed)
        cache.stored, cache.removed = [], []
        assert known == {*cache._used, *cache._unused}
        assert len(known) <= cache.num_blocks
    for digests, own in held:
        cache.free(digests, own)
    assert cache.num_used == 0


def test_waiting_times_are_those_of_a_queue_with_one_server() -> None:
    """A replica that computes one request at a time, in one step each, is M/D/1."""
    seconds, rate = 0.01, 70.0
    flat = StepCosts(
        tokens=(1,), seconds=(seconds,), sequence=0.0, decode_context=0.0, prompt_context=0.0
    )
    limits = replace(LIMITS, max_running=1)
    fleet = Fleet(replicas=1, limits=limits, costs=flat, front_costs=FREE)
    asked = workload(rate, 20_000, Mix(prompt_tokens=8, output_tokens=1))
    asked = replace(asked, asked=[replace(each, output_tokens=1) for each in asked.asked])
    outcome = simulate(fleet, asked)
    load = seconds * rate
    expected = seconds + seconds * load / (2 * (1 - load))  # Pollaczek and Khinchine
    assert outcome.first_token.mean == pytest.approx(expected, rel=0.1)
    assert outcome.busy == pytest.approx(load, rel=0.05)


def test_prefixes_are_found_more_often_where_they_decide() -> None:
    few = replace(LIMITS, num_blocks=100)  # prefixes of a quarter of the requests fit
    asked = workload(60, 1200)
    rates = {
        routing: simulate(Fleet(replicas=4, limits=few, costs=COSTS, routing=routing), asked)
        for routing in ("prefix", "random")
    }
    assert rates["prefix"].hit_rate > 1.3 * rates["random"].hit_rate
    assert rates["prefix"].first_token.mean < rates["random"].first_token.mean
    # Fronts that know nothing of each other share out each prefix.
    apart = simulate(Fleet(replicas=4, fronts=4, limits=few, costs=COSTS), asked)
    assert apart.hit_rate < rates["prefix"].hit_rate
    hashed = Fleet(replicas=4, fronts=4, fronts_by_prefix=True, limits=few, costs=COSTS)
    assert simulate(hashed, asked).hit_rate > 1.3 * apart.hit_rate


def test_a_death_costs_time_and_no_request() -> None:
    asked = workload(60, 1200)
    calm = Fleet(replicas=2, limits=LIMITS, costs=COSTS)
    whole, died = simulate(calm, asked), simulate(replace(calm, failure_seconds=1.5), asked)
    assert died.deaths > 3
    assert died.moved > 3
    assert (died.requests, died.tokens) == (whole.requests, whole.tokens)
    assert died.end_to_end.mean > whole.end_to_end.mean


def test_replicas_follow_the_load() -> None:
    rules = Autoscaling(
        least=1, most=6, target=4.0, period_seconds=1.0, start_seconds=1.0, down_seconds=5.0
    )
    busy = workload(120, 2400).asked
    calm = [replace(each, at=busy[-1].at + each.at) for each in workload(2, 100).asked]
    asked = Workload(asked=[*busy, *calm], block_size=LIMITS.block_size)
    fleet = Fleet(replicas=1, limits=LIMITS, costs=COSTS, autoscaling=rules)
    outcome = simulate(fleet, asked)
    fixed = simulate(replace(fleet, autoscaling=None), asked)
    assert outcome.most_replicas > 3
    assert outcome.replica_counts[-1][1] == 1
    assert outcome.first_token.p90 < fixed.first_token.p90


@pytest.mark.parametrize("replicas", [2, 32])
def test_a_front_without_time_is_the_limit(replicas: int) -> None:
    front = FrontCosts(token=100e-6)
    mix = Mix(prompt_tokens=32, output_tokens=16)
    asked = workload(2000, 3000, mix)
    fleet = Fleet(replicas=replicas, limits=LIMITS, costs=COSTS, front_costs=front)
    outcome, point = simulate(fleet, asked), saturation(LIMITS, COSTS, front, asked)
    assert point.replicas is not None
    if replicas > point.replicas:
        assert outcome.front_busy > 0.97
        assert outcome.throughput == pytest.approx(point.tokens, rel=0.05)
    else:
        assert outcome.throughput < point.tokens
        assert outcome.busy > 0.9


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"replicas": 1, "fronts": 2}, UsageError),
        ({"routing": "nowhere"}, UsageError),
        ({"failure_seconds": 1e-9}, CapacityError),
        ({"limits": replace(LIMITS, num_blocks=5)}, CapacityError),
        (
            {"fronts": 2, "autoscaling": Autoscaling(least=1, most=2, target=1.0)},
            UsageError,
        ),
    ],
)
def test_what_cannot_be_simulated_is_refused(
    change: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        simulate(
            Fleet(**{"replicas": 2, "limits": LIMITS, "costs": COSTS, **change}), workload(9, 9)
        )


def test_percentiles_count_how_often_each_came() -> None:
    assert Times.of([(2.0, 1), (1.0, 98), (9.0, 1)]) == Times(1.09, 1.0, 1.0, 2.0)
    assert Times.of([]) == Times(0.0, 0.0, 0.0, 0.0)
