"""Prompts are cut so that steps take what was asked, whatever the machine and its pauses."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.ir.errors import UsageError
from infc.ir.manifest import FileDigest
from infc.runtime.limits import plan_runtime
from infc.runtime.options import RuntimeOptions
from infc.runtime.scheduling.pacing import Pacer
from infc.runtime.scheduling.scheduler import Scheduler

from ..ir.artifacts import manifest
from .paged_model import PagedModel
from .scheduling import add, alone, build, run_step

TARGET_MS = 100
MOST = 512


@given(
    fixed_ms=st.integers(1, 60),
    token_us=st.integers(100, 5000),
    noise=st.floats(0.0, 0.2),
    pauses=st.booleans(),
    seed=st.integers(0, 100),
)
def test_steps_take_what_was_asked(
    fixed_ms: int, token_us: int, noise: float, pauses: bool, seed: int
) -> None:
    """Within what is known of the machine, or with the least part of a prompt."""
    pacer, draw = Pacer(TARGET_MS / 1000), random.Random(seed)
    times, sizes = [], []
    for turn in range(120):
        # Some prompts alone, then answers alone, then both.
        num_sequences = 1 if turn < 5 else 8
        most = num_sequences if 5 <= turn < 15 else MOST
        size = min(pacer.budget(num_sequences, MOST) if turn >= 5 else MOST, most)
        further = size - num_sequences
        seconds = fixed_ms / 1e3 + further * token_us / 1e6
        times.append(seconds)
        sizes.append(further)
        pause = 60.0 if pauses and turn % 25 == 7 else 0.0
        pacer.observe(num_sequences, size, seconds * draw.uniform(1 - noise, 1 + noise) + pause)
    ideal = (TARGET_MS - fixed_ms) * 1e3 / token_us
    settled = list(zip(times, sizes, strict=True))[60:]
    for seconds, further in settled:
        assert 16 <= further <= MOST - 8
        assert seconds <= 1.5 * TARGET_MS / 1e3 or further == 16
    if not pauses:
        mean = sum(further for _, further in settled) / len(settled)
        assert mean >= min(0.6 * ideal - 16, MOST - 8 - 16)


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(0, 512), st.floats(0, 1e6))))
def test_a_budget_is_always_one(steps: list[tuple[int, int, float]]) -> None:
    """Whatever the clock says: a token for each sequence, some of a prompt, never beyond limits."""
    pacer = Pacer(0.05)
    for num_sequences, further, seconds in steps:
        pacer.observe(num_sequences, num_sequences + further, seconds)
        budget = pacer.budget(num_sequences, 600)
        assert num_sequences + 16 <= budget <= 600
        assert pacer.budget(30, 32) == 32


def paced(target: float | None) -> tuple[Scheduler, PagedModel]:
    limits = {"step_tokens": 256, "max_sequences": 4, "max_context": 1000}
    scheduler, model = build(16, [None], [200], **limits)
    scheduler._pacer = None if target is None else Pacer(target)
    return scheduler, model


def run_timed(scheduler: Scheduler, model: PagedModel) -> float:
    """A step on a machine that takes 10 ms and 1 ms a token of a prompt; its seconds."""
    planned = run_step(scheduler, model)
    assert planned is not None
    seconds = 0.01 + 0.001 * (planned.step.num_tokens - planned.step.num_sequences)
    scheduler.observe(planned, seconds)
    return seconds


@pytest.mark.parametrize(("target", "longest"), [(None, 0.25), (0.06, 0.061)])
def test_a_long_prompt_is_cut_while_others_write(target: float | None, longest: float) -> None:
    scheduler, model = paced(target)
    writing = add(scheduler, "writing", [0, 1] * 100, max_tokens=40)
    assert run_timed(scheduler, model) == pytest.approx(0.209), "nobody waits: the step is full"
    for _ in range(3):
        run_timed(scheduler, model)
    late = add(scheduler, "late", [1, 2] * 300, max_tokens=3)
    times = []
    while not late.num_output_tokens:
        before = writing.num_output_tokens
        times.append(run_timed(scheduler, model))
        assert writing.num_output_tokens == before + 1
    assert max(times) == pytest.approx(longest, rel=0.15)
    while scheduler.has_unfinished:
        run_timed(scheduler, model)
    assert [writing.token_ids, late.token_ids] == [alone(writing), alone(late)]


def test_the_option_wins_over_the_recipe() -> None:
    compiled = replace(
        manifest(),
        recipe={"runtime": {"itl_target_ms": 20}},
        files={"weights.safetensors": FileDigest(bytes=100, sha256="0")},
    )
    limits = plan_runtime(compiled, RuntimeOptions()).limits
    assert limits.itl_target_seconds == 0.02
    assert Scheduler(limits, paced(None)[0].kv)._pacer is not None
    for chosen, seconds in ((50, 0.05), (0, None)):
        limits = plan_runtime(compiled, RuntimeOptions(itl_target_ms=chosen)).limits
        assert limits.itl_target_seconds == seconds
    for refused in (-1, 10**400):
        with pytest.raises(UsageError, match=f"itl_target_ms is {refused}"):
            plan_runtime(compiled, RuntimeOptions(itl_target_ms=refused))
