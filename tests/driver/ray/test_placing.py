"""Which replica of a deployment gets a request, by what is known of each."""

from __future__ import annotations

import pickle

import pytest

from infc.driver.ray.errands import Errand
from infc.driver.ray.placing import Known, Placing
from infc.ir.errors import UsageError
from infc.runtime.replicas.prefixes import prefix_digests
from infc.runtime.replicas.routing import STREAM_TOKENS, Arrival

BLOCK = 4
PROMPT = list(range(100))


def errand(prompt: list[int]) -> Errand:
    """A request with this prompt."""
    return Errand(b"order", Arrival(len(prompt), prefix_digests(prompt, "", BLOCK), BLOCK))


def held(prompt: list[int]) -> bytes:
    """What a replica tells that has the prompt in its cache."""
    return b"".join(prefix_digests(prompt, "", BLOCK))


def test_only_the_message_leaves_the_process() -> None:
    assert pickle.loads(pickle.dumps(errand(PROMPT))) == b"order"


def test_another_policy_is_refused() -> None:
    with pytest.raises(UsageError, match="no routing policy 'nearest'"):
        Placing("nearest")


def test_where_the_prefix_is_held() -> None:
    placing = Placing("prefix")
    replicas = [Known("a"), Known("b", digests=held(PROMPT)), Known("c")]
    one = errand(PROMPT)
    assert placing.ranked(replicas, one)[0] == "b"
    assert (one.replica, one.num_known) == ("b", 100)
    # It has lost them by now: nothing speaks for it any more.
    replicas[1] = Known("b", num_ongoing=1)
    assert placing.ranked(replicas, errand(PROMPT[50:]))[0] != "b"


def test_requests_with_one_beginning_stay_together_until_there_is_much_more_to_do() -> None:
    placing, replicas = Placing("prefix"), [Known("a"), Known("b")]
    chosen = []
    for index in range(20):
        one = errand([*PROMPT, 1000 + index])
        chosen.append(placing.ranked(replicas, one)[0])
        placing.accept(chosen[-1], one)
    assert chosen[:4] == [chosen[0]] * 4
    assert set(chosen) == {"a", "b"}


def test_work_of_own_requests_and_of_others() -> None:
    placing, replicas = Placing("least-loaded"), [Known("a"), Known("b")]
    first, second = errand(PROMPT), errand([])
    placing.ranked(replicas, first)
    placing.accept("a", first)
    placing.ranked(replicas, second)
    placing.accept("b", second)
    assert (first.work, second.work) == (100 + STREAM_TOKENS, STREAM_TOKENS)
    assert placing.ranked(replicas, errand(PROMPT)) == ["b", "a"]
    # Five requests that are not from here.
    others = [Known("a", num_ongoing=1), Known("b", num_ongoing=6)]
    assert placing.ranked(others, errand(PROMPT)) == ["a", "b"]
    first.is_proven = True
    assert first.work == STREAM_TOKENS
    first.is_over = second.is_over = True
    assert placing.ranked(replicas, errand(PROMPT)) == ["a", "b"]


def test_without_room_or_silent() -> None:
    placing = Placing("prefix")
    replicas = [Known("a", has_room=False, digests=held(PROMPT)), Known("b")]
    one = errand(PROMPT)
    assert placing.ranked(replicas, one) == ["b", "a"]
    placing.accept("b", one)
    one.was_silent = one.is_over = True
    assert placing.ranked(replicas, errand(PROMPT)) == ["a", "b"]
    assert placing.ranked([Known("b")], errand(PROMPT)) == ["b"]
    assert placing.ranked([], errand(PROMPT)) == []
