"""Policies: which replica gets a request."""

import pytest

from infc.ir.errors import UsageError
from infc.runtime.replicas.routing import (
    AnyOf,
    Arrival,
    Candidate,
    LeastLoaded,
    RoundRobin,
    policy_of,
)

SOME = [Candidate(0, 90), Candidate(2, 10), Candidate(3, 10)]


def test_the_least_loaded_and_first_of_equals() -> None:
    assert LeastLoaded().choose(Arrival(1), SOME).replica == 2


def test_one_after_the_other_also_where_one_is_missing() -> None:
    policy = RoundRobin()
    assert [policy.choose(Arrival(1), SOME).replica for _ in range(4)] == [0, 2, 3, 0]
    assert policy.choose(Arrival(1), SOME[:1]).replica == 0
    assert policy.choose(Arrival(1), SOME[1:]).replica == 2


def test_any_of_them() -> None:
    policy = AnyOf(seed=1)
    assert {policy.choose(Arrival(1), SOME).replica for _ in range(50)} == {0, 2, 3}


def test_policies_have_names() -> None:
    assert isinstance(policy_of("round-robin"), RoundRobin)
    with pytest.raises(UsageError, match="no routing policy 'best'"):
        policy_of("best")
