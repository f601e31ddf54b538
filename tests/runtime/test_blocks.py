"""The block pool by itself: no block lost, none with two lives, eviction in order."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from infc.runtime.scheduling.blocks import BlockPool


class PoolMachine(RuleBasedStateMachine):
    """A pool beside a plain model of it: owners as a list, contents as a dictionary."""

    @initialize(num_blocks=st.integers(2, 9))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)
        self.owned: list[int] = []
        self.contents: dict[int, bytes] = {}

    @rule()
    def allocate(self) -> None:
        free = [b for b in range(1, self.pool.num_blocks) if b not in self.owned]
        if not free:
            with pytest.raises(IndexError):
                self.pool.allocate()
            return
        block = self.pool.allocate()
        assert block in free
        if set(free) - set(self.contents):
            assert block not in self.contents, "evicted while a block without content was free"
        self.contents.pop(block, None)
        self.owned.append(block)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(self.owned))
        self.owned.remove(block)
        self.pool.release(block)

    @precondition(lambda self: self.owned)
    @rule(data=st.data(), digest=st.binary(min_size=1, max_size=1))
    def register(self, data: st.DataObject, digest: bytes) -> None:
        block = data.draw(st.sampled_from(self.owned))
        self.pool.register(block, digest)
        if block not in self.contents and digest not in self.contents.values():
            self.contents[block] = digest

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def reuse(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.contents)))
        assert self.pool.lookup(self.contents[block]) == block
        self.pool.retain(block)
        self.owned.append(block)

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.contents)))
        self.pool.forget(block)
        assert self.pool.lookup(self.contents.pop(block)) is None

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check(self.owned)
            assert self.pool.num_cached == len(self.contents)
            assert self.pool.num_free == self.pool.capacity - len(set(self.owned))
            for block in set(self.owned):
                shared = self.owned.count(block) > 1 or block in self.contents
                assert self.pool.is_shared(block) == shared


TestPool = PoolMachine.TestCase


def test_a_free_block_whose_content_was_forgotten_is_reused_first() -> None:
    pool = BlockPool(3)
    for digest in (b"a", b"b"):
        pool.register(pool.allocate(), digest)
    pool.release(1)
    pool.release(2)
    pool.forget(2)
    assert pool.allocate() == 2
    assert pool.lookup(b"a") == 1


def test_least_recently_used_content_goes_first() -> None:
    pool = BlockPool(4)
    blocks = [pool.allocate() for _ in range(3)]
    for block in blocks:
        pool.register(block, bytes([block]))
    for block in (blocks[1], blocks[0], blocks[2]):
        pool.release(block)
    kept = pool.lookup(bytes([blocks[1]]))
    assert kept is not None
    pool.retain(kept)  # used again, so it is the most recent now
    pool.release(kept)
    assert [pool.allocate() for _ in range(3)] == [blocks[0], blocks[2], blocks[1]]
    assert pool.num_evictions == 3


def test_a_pool_of_the_null_block_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="null block"):
        BlockPool(1)
