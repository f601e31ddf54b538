"""Rows of attention of models in ONNX: each token once, beside the keys that it sees."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from infc.ir.resources import KvGroup
from infc.runtime.executors.onnxruntime_feeds import UNSEEN, Pieces, padded_rows, paged_keys

from ..codegen.harness import Chunk, make_step

BLOCK = 4
GROUP = KvGroup("g", (0,), 1, 8, 8, "f32", BLOCK, None)
WINDOW = KvGroup("w", (1,), 1, 8, 8, "f32", BLOCK, 5)

chunks = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30)), min_size=1, max_size=9)


@given(chunks)
def test_each_token_has_a_place_and_sees_all_of_its_keys(sizes: list[tuple[int, int]]) -> None:
    """And no slot of another sequence, or one that was never written."""
    own, free = [], 1
    for count, start in sizes:
        needed = -(-(start + count) // BLOCK)
        own.append(Chunk([1] * count, start, list(range(free, free + needed))))
        free += needed
    step = make_step(own, num_groups=2, block_size=BLOCK)
    pieces = Pieces.of(step)
    rows = padded_rows(pieces)
    flat = rows["row_of_padded"].reshape(-1)
    assert np.array_equal(flat[rows["padded_of_row"]], np.arange(step.num_tokens))
    feeds = paged_keys(step, (GROUP, WINDOW), pieces)
    for group in (GROUP, WINDOW):
        slots, places = feeds[f"key_slots.{group.name}"], feeds[f"key_positions.{group.name}"]
        for piece, sequence in enumerate(pieces.sequences):
            chunk = own[sequence]
            seen = {}
            for slot, place in zip(slots[piece].tolist(), places[piece].tolist(), strict=True):
                position = chunk.blocks.index(slot // BLOCK) * BLOCK + slot % BLOCK
                assert place in (position, UNSEEN)
                seen[place] = position
            for token in rows["row_of_padded"][piece]:
                at = int(step.positions[token])
                least = 0 if group.window is None else max(0, at - group.window + 1)
                assert set(range(least, at + 1)) <= seen.keys()


def test_sequences_that_decode_are_not_padded_to_a_chunk() -> None:
    """One prompt of 256 tokens beside 31 sequences of one each."""
    own = [Chunk([1] * 256, 0, list(range(1, 65)))]
    own += [Chunk([1], 0, [65 + i]) for i in range(31)]
    pieces = Pieces.of(make_step(own, num_groups=1, block_size=BLOCK))
    padded = padded_rows(pieces)["row_of_padded"]
    assert padded.size < 3 * (256 + 31)


def test_steps_of_one_kind_have_a_row_for_each_sequence() -> None:
    for count in (1, 5, 256):
        own = [Chunk([1] * count, 0, list(range(1 + 64 * i, 65 + 64 * i))) for i in range(3)]
        pieces = Pieces.of(make_step(own, num_groups=1, block_size=BLOCK))
        assert pieces.counts.tolist() == [count] * 3
