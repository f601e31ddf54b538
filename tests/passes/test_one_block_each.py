"""Slots for whole contexts: their size, the context that is too long, and runs that compare."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from infc.ir.builder import ProgramBuilder
from infc.ir.errors import UsageError
from infc.ir.program import ModelSpec, Program
from infc.ir.resources import KvGroup
from infc.ir.types import DType, Sym, TensorType
from infc.passes.base import PassContext
from infc.passes.one_block_each import OneBlockEach
from infc.passes.sample_runs import _pages


def program(max_context: int) -> Program:
    """Two groups, of which one has a window."""
    b = ProgramBuilder("slots", phase="lowered")
    b.symbol("T", 1, 64)
    ids = b.input("input_ids", TensorType(DType.I64, (Sym("T"),)))
    b.outputs = [b.emit("cast", ids, dtype="f32")]
    groups = (
        KvGroup("full", (0,), 1, 8, 8, "f32", 16),
        KvGroup("window9", (1,), 1, 8, 8, "f32", 16, 9),
    )
    spec = ModelSpec("x", 2, 8, 1, 1, 8, 8, max_context)
    return replace(b.build(), spec=spec, resources=groups)


def test_a_block_holds_a_context_and_the_tokens_of_a_step() -> None:
    made = OneBlockEach().run(program(512), PassContext()).program
    assert [group.block_size for group in made.resources] == [576, 576]


def test_no_sequence_has_a_step_longer_than_its_context() -> None:
    made = OneBlockEach().run(program(40), PassContext()).program
    assert [group.block_size for group in made.resources] == [80, 80]


@pytest.mark.parametrize(
    ("heads", "sizes", "tokens"),
    [(1, (8, 8), 80), (1, (8, 4), 96), (1, (24, 8), 80), (4, (8, 8), 68), (4, (64, 64), 66)],
)
def test_slots_begin_where_an_array_may(heads: int, sizes: tuple[int, int], tokens: int) -> None:
    """Slots of 66 tokens in bf16, and behind them as many as make whole multiples of 256 bytes."""
    made = replace(program(33), resources=(KvGroup("full", (0,), heads, *sizes, "bf16", 16),))
    (group,) = OneBlockEach(align_bytes=256).run(made, PassContext()).program.resources
    assert group.block_size == tokens
    (group,) = OneBlockEach().run(made, PassContext()).program.resources
    assert group.block_size == 66


def test_a_context_that_is_too_long_is_refused() -> None:
    with pytest.raises(UsageError, match=r"65537 tokens is too long.*lower runtime.max_context"):
        OneBlockEach().run(program(65536 - 63), PassContext())


def test_slots_that_nobody_asked_for_are_not_too_large() -> None:
    """64 sequences of 576 tokens, in two layers of 16 elements."""
    size = 64 * 576 * 2 * 16 * 4
    assert OneBlockEach(most_bytes=size).run(program(512), PassContext()).matches == 2
    kept = OneBlockEach(most_bytes=size - 1).run(program(512), PassContext())
    assert kept.matches == 0
    assert "slots for 64 sequences take 4.5 MiB, more than" in str(*kept.near_misses)
    long = OneBlockEach(most_bytes=1 << 60).run(program(65536 - 63), PassContext())
    assert "longer than 65536" in str(*long.near_misses)


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"dtype": "bf16"}, "full is in bf16"), ({"value_head_dim": 4}, "full are of two sizes")],
)
def test_plain_caches_alone_may_be_wanted(change: dict[str, Any], reason: str) -> None:
    made = program(512)
    full, near = made.resources
    assert isinstance(full, KvGroup)
    other = replace(made, resources=(replace(full, **change), near))
    assert OneBlockEach(plain=True).run(made, PassContext()).matches == 2
    kept = OneBlockEach(plain=True).run(other, PassContext())
    assert kept.program is other
    assert reason in str(*kept.near_misses)


def test_runs_that_compare_take_no_memory_for_a_whole_context() -> None:
    made = OneBlockEach().run(program(32768), PassContext()).program
    assert _pages(made, [37, 20]).num_bytes < 1 << 18
