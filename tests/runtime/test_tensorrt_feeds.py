"""How steps are cut into parts for the profiles of an engine, and what each part is told."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest

from infc.ir.errors import CapacityError
from infc.ir.resources import KvGroup
from infc.ir.tensorrt_engine import StepProfile
from infc.runtime.executors.tensorrt_feeds import Part, StepParts, part_feeds
from infc.runtime.scheduling.step import Step

from ..codegen.harness import Chunk, make_step

PROFILES = (
    StepProfile(decode=True, rows=2, queries=1, tokens=2, logit_rows=2),
    StepProfile(decode=True, rows=8, queries=1, tokens=8, logit_rows=8),
    StepProfile(decode=False, rows=8, queries=64, tokens=64, logit_rows=8),
)
GROUP = KvGroup("full", (0,), 2, 16, 16, "bf16", 256, None)


def step_of(*sequences: tuple[int, int, int]) -> Step:
    """Sequences as (slot, tokens before the step, tokens in it); the last of each is wanted."""
    chunks = [Chunk(list(range(count)), start, [slot]) for slot, start, count in sequences]
    ends = np.cumsum([count for _, _, count in sequences]) - 1
    return make_step(chunks, num_groups=1, block_size=256, rows=ends.tolist())


def parts_of(step: Step, *, slots: int = 32) -> list[Part]:
    return list(StepParts(PROFILES, [slots], longest=128).of(step))


def shown(parts: Sequence[Part]) -> list[tuple[int, int, int, list[int]]]:
    """Profile, first slot, rows and sequences of parts."""
    return [(one.profile, *one.firsts, *one.rows, one.sequences.tolist()) for one in parts]


def test_sequences_that_decode_are_padded_to_a_bucket() -> None:
    assert shown(parts_of(step_of((2, 9, 1), (1, 5, 1)))) == [(0, 1, 2, [1, 0])]
    assert shown(parts_of(step_of((3, 9, 1), (1, 5, 1)))) == [(1, 1, 8, [1, 0])]
    assert shown(parts_of(step_of((30, 9, 1), (31, 5, 1)))) == [(0, 30, 2, [0, 1])]
    assert shown(parts_of(step_of((27, 9, 1), (31, 5, 1)))) == [(1, 24, 8, [0, 1])], "at the end"


def test_slots_that_are_far_from_each_other_are_parts_of_their_own() -> None:
    assert shown(parts_of(step_of((1, 9, 1), (20, 5, 1)))) == [(0, 1, 2, [0]), (0, 20, 2, [1])]


def test_chunks_are_no_part_of_what_decodes_and_are_not_padded_much() -> None:
    step = step_of((1, 4, 1), (2, 0, 40), (3, 0, 2), (4, 0, 2))
    assert shown(parts_of(step)) == [(2, 2, 3, [1, 2, 3]), (0, 1, 2, [0])]
    step = step_of((1, 0, 40), (7, 0, 2))
    assert shown(parts_of(step)) == [(2, 1, 1, [0]), (2, 7, 1, [1])], "seven rows of 40"


def test_all_slots_of_a_part_are_bound_wherever_they_lie() -> None:
    draw = random.Random(0)
    for _ in range(200):
        slots = draw.sample(range(1, 12), draw.randint(1, 8))
        step = step_of(*((slot, 9, draw.choice([1, 1, 2, 7])) for slot in slots))
        parts = parts_of(step, slots=12)
        assert sorted(at for one in parts for at in one.sequences) == list(range(len(slots)))
        for one in parts:
            (own,), (first,), (rows,) = one.slots, one.firsts, one.rows
            assert first <= own.min() and own.max() < first + rows <= 12
            assert rows <= PROFILES[one.profile].rows


def test_a_step_beyond_all_profiles_is_refused() -> None:
    with pytest.raises(CapacityError, match="takes 65 tokens in 1 rows"):
        parts_of(step_of((1, 0, 65)))


def test_rows_of_others_write_behind_what_they_hold() -> None:
    step = step_of((1, 9, 1), (3, 0, 3))
    chunk, decode = parts_of(step)
    lengths = np.array([0, 9, 77, 0, 0, 0, 0, 0, 0], np.int64)
    feeds = part_feeds(step, decode, PROFILES[0], [GROUP], [lengths])
    found = {name: array.tolist() for name, array in feeds.arrays.items()}
    assert found["write_at.full"] == [9, 77]
    assert found["input_ids"] == [0, 0] and found["positions"] == [9, 0]
    assert found["row_of_padded.full"] == [[0], [0]] and found["padded_of_row.full"] == [0, 0]
    assert found["key_places.full"] == list(range(32))
    assert feeds.logit_rows.tolist() == [0]
    feeds = part_feeds(step, chunk, PROFILES[2], [GROUP], [lengths])
    found = {name: array.tolist() for name, array in feeds.arrays.items()}
    assert found["input_ids"] == [0, 1, 2] and found["logits_index"] == [2]
    assert found["row_of_padded.full"] == [[0, 1, 2]] and found["write_at.full"] == [0]
    assert feeds.logit_rows.tolist() == [1]
