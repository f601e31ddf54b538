"""Routing by prefixes: what engines tell of their caches, and where requests go by it."""

from __future__ import annotations

from random import Random

import pytest

from infc.runtime.replicas import prefixes
from infc.runtime.replicas.block_news import BlockNews
from infc.runtime.replicas.prefixes import DIGEST_BYTES, PrefixIndex, prefix_digests
from infc.runtime.replicas.routing import Arrival, ByPrefix, Candidate
from infc.runtime.sampling.sampling_params import SamplingParams

from ..engines import make_engine

A, B, C = b"a", b"b", b"c"


def test_digests_are_a_chain_of_full_blocks() -> None:
    one, two = prefix_digests([1, 2, 3, 4, 5], "", 2)
    assert prefix_digests([1, 2, 3, 4], "", 2) == (one, two)
    assert prefix_digests([1, 2, 9, 4], "", 2)[0] == one
    assert prefix_digests([1, 2, 9, 4], "", 2)[1] != two
    assert prefix_digests([9, 2, 3, 4], "", 2)[1] != two
    assert prefix_digests([1, 2, 3, 4], "salt", 2)[0] != one
    assert prefix_digests([1], "", 2) == ()


def test_an_index_knows_what_is_stored_and_what_is_expected() -> None:
    index = PrefixIndex()
    index.change([A], [])
    assert index.num_found([A, B]) == 1
    assert index.num_found([B, A]) == 0
    index.expect([A, B, C])
    assert index.num_found([A, B, C]) == 3
    index.change([B], [])
    index.change([], [B])
    assert index.num_found([A, B, C]) == 1
    index.clear()
    assert index.num_found([A, B, C]) == 0


def test_what_is_expected_and_never_comes_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefixes, "_MOST_EXPECTED", 2)
    index = PrefixIndex()
    index.expect([A, B])
    index.expect([A, C])
    assert [index.num_found([each]) for each in (A, B, C)] == [1, 0, 1]


def test_requests_go_where_their_beginning_is_unless_that_has_too_much_to_do() -> None:
    policy = ByPrefix()
    policy.change(1, [A, B], [])

    def chosen(work: int, *digests: bytes) -> int:
        arrival = Arrival(40, digests, block_size=16)
        return policy.choose(arrival, [Candidate(0, 10), Candidate(1, work)]).replica

    assert chosen(9) == 1
    assert chosen(11) == 0
    assert chosen(10 + 2 * 32, A, B) == 0  # by the index
    policy.clear(0)
    assert chosen(10 + 2 * 32 - 1, A, B) == 1
    assert chosen(10 + 2 * 32 + 1, A, B) == 0  # which is there now as well
    assert chosen(10, A, B) == 0
    policy.clear(0)
    assert chosen(10, A, B) == 1


def test_conversations_that_begin_together_stay_together() -> None:
    """Before any replica has told what it has stored."""
    policy = ByPrefix()
    first = policy.choose(Arrival(40, [A, B], 16), [Candidate(0, 0), Candidate(1, 0)]).replica
    work = [Candidate(first, 20), Candidate(1 - first, 0)]
    assert policy.choose(Arrival(40, [A, B, C], 16), work).replica == first
    assert policy.choose(Arrival(40, [b"d"], 16), work).replica == 1 - first


def test_an_engine_tells_of_every_block_that_can_be_found() -> None:
    engine, random, found = make_engine(50, num_blocks=30), Random(1), set[bytes]()
    news, num_removed = BlockNews(engine), 0
    for number in range(60):
        prompt = [random.randrange(2) for _ in range(random.randrange(1, 24))]
        engine.add_request(str(number), prompt, SamplingParams(max_tokens=random.randrange(1, 8)))
        while engine.has_unfinished:
            engine.step()
            if random.random() < 0.5:
                stored, removed = news.take()
                found.update(stored)
                found.difference_update(removed)
                num_removed += len(removed)
        stored, removed = news.take()
        found = (found | set(stored)) - set(removed)
        num_removed += len(removed)
        pool = engine.scheduler.kv.pools[0]
        assert found == {digest[:DIGEST_BYTES] for digest in pool._by_hash}
        full = prefix_digests(prompt, "", 4)
        assert set(full) <= found
    assert num_removed > 20
    engine.scheduler = engine._new_scheduler()
    stored, removed = news.take()
    assert (set(stored), set(removed)) == (set(), found)
