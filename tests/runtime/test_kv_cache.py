"""The KV cache by itself: shared sequences, and prefixes of which a window has lost a part."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from infc.runtime.requests.sequence_blocks import SequenceBlocks
from infc.runtime.scheduling.kv_cache import Headroom, KvCache

from .paged_model import KEPT, Kept, make_group


class _Sequence:
    """Blocks, the tokens behind them, and how many of those are stored."""

    def __init__(self, tokens: list[int]) -> None:
        self.blocks = SequenceBlocks()
        self.tokens = tokens
        self.num_computed = 0


class CacheMachine(RuleBasedStateMachine):
    """Sequences begin, fork, grow and end in any order; none writes where another reads."""

    reached: ClassVar[Counter[str]] = Counter()
    """What sequences met, in all runs."""

    @initialize(
        block_size=st.integers(1, 4),
        windows=st.lists(KEPT, min_size=1, max_size=3),
        num_blocks=st.integers(2, 30),
        batch_slots=st.integers(1, 6),
    )
    def start(
        self, block_size: int, windows: list[Kept], num_blocks: int, batch_slots: int
    ) -> None:
        groups = [make_group(f"g{i}", block_size, w) for i, w in enumerate(windows)]
        self.kv = KvCache(
            groups, [num_blocks] * len(groups), max_sequences=batch_slots, max_context=60
        )
        self.sequences: list[_Sequence] = []

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12))
    def admit(self, tokens: list[int]) -> None:
        sequence = _Sequence(list(tokens))
        cached = self.kv.admit(sequence.blocks, tokens, Headroom())
        if cached is None:
            self.reached["refused"] += 1
            return
        self.reached["cached" if cached else "new"] += 1
        assert 0 <= cached < len(tokens)
        sequence.num_computed = cached
        self.sequences.append(sequence)

    @property
    def whole(self) -> list[_Sequence]:
        """Of others, what is set aside for the rest would be shared too."""
        return [one for one in self.sequences if one.num_computed == len(one.tokens)]

    @precondition(lambda self: self.whole)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.whole))
        twin = _Sequence(list(sequence.tokens))
        if not self.kv.fork(sequence.blocks, twin.blocks):
            return
        self.reached["forked"] += 1
        twin.num_computed = sequence.num_computed
        self.sequences.append(twin)

    @property
    def short(self) -> list[_Sequence]:
        """Those that may still grow."""
        return [one for one in self.sequences if len(one.tokens) <= 50]

    @precondition(lambda self: self.short)
    @rule(data=st.data(), count=st.integers(1, 5), token=st.integers(0, 1))
    def grow(self, data: st.DataObject, count: int, token: int) -> None:
        sequence = data.draw(st.sampled_from(self.short))
        start, size = sequence.num_computed, self.kv.block_size
        before = len(sequence.tokens)
        sequence.tokens += [token] * max(0, start + count - before)
        count = self.kv.extend(sequence.blocks, sequence.tokens, start, count)
        if count == 0:
            del sequence.tokens[before:]
            return  # no block was free: nothing is written
        self.kv.take_copies()
        step = self.kv.close_plan()
        for g, pool in enumerate(self.kv.pools):
            for index in range(start // size, -(-(start + count) // size)):
                block = sequence.blocks.ids[g][index]
                assert pool.references(block) == 1, "it would write where another reads"
                registered_early = step is not None and (g, block) in step.registered_early
                assert registered_early or not pool.is_shared(block), (
                    "it was found by others already"
                )
        sequence.num_computed += count
        del sequence.tokens[max(before, sequence.num_computed) :]
        self.kv.end_step(step)
        self.kv.advance(sequence.blocks, sequence.num_computed)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), forget=st.booleans())
    def end(self, data: st.DataObject, forget: bool) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        self.sequences.remove(sequence)
        self.kv.release(sequence.blocks, forget=forget)

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "kv"):
            self.kv.check([sequence.blocks for sequence in self.sequences])

    def teardown(self) -> None:
        if hasattr(self, "kv"):
            for sequence in self.sequences:
                self.kv.release(sequence.blocks)
            self.kv.check([])


def test_any_order_of_sequences() -> None:
    """The machine asserts after each event; here, that none of them is missing."""
    CacheMachine.reached.clear()
    run_state_machine_as_test(
        CacheMachine, settings=settings(max_examples=100, stateful_step_count=40)
    )
    assert CacheMachine.reached.keys() == {"new", "cached", "refused", "forked"}


def test_a_shorter_hit_must_hold_its_own_window() -> None:
    """A full hit without room for its copy: the block before is not there for a shorter one."""
    kv = KvCache([make_group("g", 2, 2)], [4], max_sequences=2, max_context=20)
    tokens = [0, 1, 1, 0]
    first, other, again = _Sequence(tokens), _Sequence([1, 1, 1]), _Sequence(tokens)
    assert kv.admit(first.blocks, tokens, Headroom()) == 0
    assert kv.extend(first.blocks, tokens, 0, 4) == 4
    kv.end_step(kv.close_plan())
    kv.advance(first.blocks, 4)
    kv.release(first.blocks)
    assert kv.admit(other.blocks, other.tokens, Headroom()) == 0
    assert kv.extend(other.blocks, other.tokens, 0, 3) == 3
    assert kv.pools[0].num_evictions == 1, "the first block, which the window had passed"
    assert kv.admit(again.blocks, tokens, Headroom()) is None
    kv.release(other.blocks)
    assert kv.admit(again.blocks, tokens, Headroom()) == 3
