"""Steps over long blocks as steps over shorter ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from infc.driver.parity.layout import Layout
from infc.ir.errors import UsageError
from infc.ir.resources import KvGroup
from infc.runtime.scheduling.step import NO_PAIRS, Step

FULL = KvGroup("full", (0, 1), 1, 4, 4, "f32", 8)
NEAR = replace(FULL, name="near", layers=(2,), window=6)


def ints(*values: object) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    return np.array(values, np.int32)


def step(size: int) -> Step:
    """Two tokens of a sequence in blocks 3, 1 and one in block 2, and two copied blocks."""
    return Step(
        token_ids=ints(5, 6, 7),
        positions=ints(size - 1, size, 2),
        query_starts=ints(0, 2, 3),
        context_lengths=ints(size + 1, 3),
        block_tables=(ints([3, 1], [2, 0]),),
        slots=(ints(3 * size + size - 1, size, 2 * size + 2),),
        block_copies=(ints([1, 2], [3, 1]),),
        logits_index=ints(1, 2),
    )


def test_each_block_becomes_those_that_follow_each_other() -> None:
    small = replace(FULL, block_size=2)
    layout = Layout.between([FULL], [small], 100, "b")
    assert layout.num_blocks([4]) == (13,)
    found = layout.translated(step(8))
    table = found.block_tables[0]
    assert table.tolist() == [[9, 10, 11, 12, 1], [5, 6, 7, 8, 0]]
    # Each token goes where the table says that its position is.
    for token, sequence in enumerate([0, 0, 1]):
        position = int(found.positions[token])
        expected = table[sequence, position // 2] * 2 + position % 2
        assert found.slots[0][token] == expected
    copies = found.block_copies[0].tolist()
    assert copies == [[1, 5], [2, 6], [3, 7], [4, 8], [9, 1], [10, 2], [11, 3], [12, 4]]


def test_slots_are_no_multiple_of_blocks() -> None:
    slot = replace(FULL, block_size=19)
    layout = Layout.between([slot], [FULL], 19, "b")
    assert (layout.ratio, layout.num_blocks([3])) == (3, (7,))
    one = replace(step(18), block_tables=(ints([2], [1]),), block_copies=(NO_PAIRS,))
    found = layout.translated(replace(one, slots=(ints(2 * 19 + 17, 2 * 19 + 18, 19 + 2),)))
    assert found.block_tables[0].tolist() == [[4, 5, 6], [1, 2, 3]]
    assert found.slots[0].tolist() == [6 * 8 + 1, 6 * 8 + 2, 8 + 2]


def test_a_group_has_the_table_of_its_window() -> None:
    layout = Layout.between([NEAR, FULL], [FULL, NEAR, FULL], 100, "b")
    assert layout.sources == (1, 0, 1)
    assert Layout.between([FULL], [NEAR], 100, "b").sources == (0,)
    with pytest.raises(UsageError, match="no layers with no window"):
        Layout.between([NEAR], [FULL], 100, "b")


def test_blocks_that_do_not_consist_of_smaller_ones_are_refused() -> None:
    odd = replace(FULL, block_size=12)
    with pytest.raises(UsageError, match=r"^b: blocks of 12 and of 8 tokens .*kv_cache.block_size"):
        Layout.between([odd], [FULL], 100, "b")
