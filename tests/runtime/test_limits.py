"""The memory plan: never above the budget, never without need below it, hints that are true."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.ir.errors import CapacityError, UsageError
from infc.ir.manifest import FileDigest, Manifest
from infc.ir.resources import Resource
from infc.ir.sizes import format_size
from infc.runtime.executors.base import HOST
from infc.runtime.limits import (
    _too_little,
    longest_context,
    parse_bytes,
    plan_blocks,
    plan_runtime,
)
from infc.runtime.options import RuntimeOptions
from infc.runtime.scheduling.admission import SchedulerLimits
from infc.runtime.scheduling.kv_cache import KvCache

from ..ir.artifacts import manifest
from .paged_model import Kept, make_group

windows: st.SearchStrategy[Kept] = (
    st.none() | st.integers(1, 70) | st.sampled_from(["latent", "state"])
)


def groups_of(block_size: int, chosen: list[Kept]) -> list[Resource]:
    return [make_group(f"g{i}", block_size, kept, i + 1) for i, kept in enumerate(chosen)]


def bytes_of(groups: list[Resource], blocks: tuple[int, ...]) -> int:
    return sum(g.bytes_per_block() * n for g, n in zip(groups, blocks, strict=True))


def limits_of(context: int, sequences: int, step: int) -> SchedulerLimits:
    return SchedulerLimits(
        step_tokens=step, max_sequences=sequences, logit_rows=sequences, max_context=context
    )


@given(
    st.sampled_from([1, 4, 16]),
    st.lists(windows, min_size=1, max_size=3),
    st.integers(0, 200_000),
    st.integers(2, 200),
    st.integers(1, 6),
    st.integers(1, 40),
)
def test_plan_fits_and_what_it_says_it_holds_is_held(
    block_size: int,
    chosen: list[Kept],
    budget: int,
    context: int,
    sequences: int,
    step: int,
) -> None:
    groups = groups_of(block_size, chosen)
    limits = limits_of(context, sequences, step)
    blocks = plan_blocks(groups, limits, budget)
    null_blocks = bytes_of(groups, (1,) * len(groups))
    assert bytes_of(groups, blocks) <= max(budget, null_blocks)
    held = longest_context(groups, blocks, context)
    assert held <= context
    if held < 2:
        return
    kv = KvCache(groups, blocks, max_sequences=limits.max_running, max_context=held)
    assert kv.holds_alone(held)
    more = plan_blocks(groups, limits, 2 * budget)
    assert all(a <= b for a, b in zip(blocks, more, strict=True))


@given(
    st.sampled_from([1, 4, 16]),
    st.lists(windows, min_size=1, max_size=3),
    st.integers(2, 500),
    st.integers(1, 4),
)
def test_the_memory_that_the_error_asks_for_is_enough(
    block_size: int, chosen: list[Kept], context: int, sequences: int
) -> None:
    groups = groups_of(block_size, chosen)
    limits = limits_of(context, sequences, 8)
    error = _too_little(groups, context, 0, 0)
    found = re.search(r"at least ([\d.]+) (\w*B)", str(error))
    assert found is not None
    # The text rounds to a tenth of its unit, so a tenth more is what it means at the worst.
    unit = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20}[found[2]]
    budget = int((float(found[1]) + 0.1) * unit)
    blocks = plan_blocks(groups, limits, budget)
    assert longest_context(groups, blocks, context) == context


def test_unlimited_memory_is_no_more_than_all_sequences_can_use() -> None:
    groups = groups_of(4, [None, 6])
    blocks = plan_blocks(groups, limits_of(40, 3, 8), 1 << 40)
    assert blocks == (3 * 10 + 1, 3 * 3 + 2 + 1)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (4096, 4096),
        ("512", 512),
        ("1KiB", 1024),
        ("1.5 GiB", 3 << 29),
        ("2GB", 2 * 10**9),
        ("3 mib", 3 << 20),
    ],
)
def test_amounts_of_memory(text: int | str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "a lot", "1 GiBs", "-1", "0", 0, -5, "1e9", "nan"])
def test_what_is_no_amount_of_memory(text: int | str) -> None:
    with pytest.raises(UsageError, match="not a memory size"):
        parse_bytes(text)


def test_sizes_for_people() -> None:
    assert format_size(3 << 29) == "1.5 GiB"
    assert format_size(100) == "100 B"


def served() -> Manifest:
    """A manifest with the one file that the plan asks for."""
    return replace(manifest(), files={"weights.safetensors": FileDigest(bytes=100, sha256="0")})


@pytest.mark.parametrize("threads", [0, -3, 1025, "2", True, 1.5])
def test_a_number_of_threads_that_cannot_be(threads: Any) -> None:
    with pytest.raises(UsageError, match=r"threads is .*, outside 1\.\.1024"):
        plan_runtime(served(), RuntimeOptions(threads=threads))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("max_waiting", value) for value in (0, -1, True, 2.0, "4", None)],
        *[("pin", value) for value in ("yes", 1, 0)],
        *[("prefix_reuse", value) for value in ("no", 0, None)],
        *[
            (name, value)
            for name in ("max_context", "max_sequences", "step_tokens")
            for value in (1.5, True, "8")
        ],
    ],
)
def test_an_option_of_another_type_is_named(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name} is {re.escape(repr(value))}") as caught:
        plan_runtime(served(), RuntimeOptions(**{name: value}))
    assert caught.value.hint is not None


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("max_context", 2, 64), ("max_sequences", 1, 4), ("step_tokens", 1, 32)],
)
def test_a_limit_is_only_lowered(name: str, least: Any, most: Any) -> None:
    """And a context never below a token to read and one to write."""
    for value in (least, most):
        limits = plan_runtime(served(), RuntimeOptions(threads=1, **{name: value})).limits
        assert getattr(limits, name) == value
    for value, hint in ((least - 1, None), (most + 1, f"of at least {most + 1}")):
        with pytest.raises(CapacityError, match=rf"outside {least}\.\.{most}") as caught:
            plan_runtime(served(), RuntimeOptions(threads=1, **{name: value}))
        assert (caught.value.hint is None) == (hint is None)
        assert (hint or "") in (caught.value.hint or "")


def test_more_threads_than_processors_are_not_pinned() -> None:
    usable = len(os.sched_getaffinity(0))
    assert plan_runtime(served(), RuntimeOptions(threads=usable, pin=True)).pin
    assert plan_runtime(served(), RuntimeOptions(threads=usable + 1)).num_threads == usable + 1
    with pytest.raises(CapacityError, match=f"cannot be pinned to the {usable} processors"):
        plan_runtime(served(), RuntimeOptions(threads=usable + 1, pin=True))


def test_more_threads_than_processors_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infc.runtime.limits.available_cpus", lambda: 2)
    (note,) = plan_runtime(served(), RuntimeOptions(threads=3)).notes
    assert note.startswith("3 threads share 2 processors: ")
    compiled = replace(served(), recipe={"runtime": {"threads": 3}})
    assert plan_runtime(compiled, RuntimeOptions()).notes == (note,)
    for threads in (1, 2, None):
        assert plan_runtime(served(), RuntimeOptions(threads=threads)).notes == ()


def test_memory_beyond_the_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infc.runtime.limits.available_memory", lambda: 1 << 30)
    plan = plan_runtime(served(), RuntimeOptions(kv_memory="1000GiB", threads=1))
    (note,) = plan.notes
    assert note.startswith("KV memory of 1000.0 GiB exceeds the free memory of 1.0 GiB:")
    assert note.endswith(
        f" {format_size(plan.memory[HOST].kv)} are used, enough for 4 sequences of 64 tokens"
    )
    assert plan_runtime(served(), RuntimeOptions(kv_memory="900MiB", threads=1)).notes == ()
    assert plan_runtime(served(), RuntimeOptions(threads=1)).notes == ()


def test_more_memory_than_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """An amount that was asked for is found too large now, not by a kill under load."""
    plan = plan_runtime(served(), RuntimeOptions(kv_memory="1GiB", threads=1))
    use = plan.memory[HOST]
    free = use.kv + use.arena + use.handed_over
    monkeypatch.setattr("infc.runtime.limits.available_memory", lambda: free)
    fitted = plan_runtime(served(), RuntimeOptions(kv_memory=plan.memory[HOST].kv, threads=1))
    mapped = replace(use, weights=0, mapped=use.weights)
    # Nothing is left for a copy of the weights.
    assert fitted == replace(plan, weights="mapped", memory={HOST: mapped})
    monkeypatch.setattr("infc.runtime.limits.available_memory", lambda: free - 1)
    with pytest.raises(CapacityError, match=r"exceeds the .* that are free"):
        plan_runtime(served(), RuntimeOptions(kv_memory="1GiB", threads=1))


@pytest.mark.parametrize(
    ("compiled", "step_tokens", "rows"), [(4, None, 4), (1000, None, 32), (1000, 8, 8), (4, 8, 4)]
)
def test_what_a_step_hands_over_is_planned(
    compiled: int, step_tokens: int | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and hidden states in float32, of no more rows than a step has tokens."""
    base = served()
    wide = base.with_main(
        outputs={"logits": "f32[R, 100000]", "hidden": "f32[R, 48]"},
        limits=replace(base.main.limits, logit_rows=compiled),
    )
    options = RuntimeOptions(threads=1, step_tokens=step_tokens)
    plan = plan_runtime(wide, options)
    assert plan.memory[HOST].handed_over == rows * (100_000 + 48) * 4
    assert plan.limits.logit_rows == rows
    # What is left for KV by itself, and what is refused, leave room for it.
    use = plan.memory[HOST]
    fixed = use.weights + use.mapped + use.arena + use.handed_over
    monkeypatch.setattr(
        "infc.runtime.limits.available_memory", lambda: fixed + 2 * plan.memory[HOST].kv
    )
    assert plan_runtime(wide, options).memory[HOST].kv == use.kv
    monkeypatch.setattr(
        "infc.runtime.limits.available_memory", lambda: fixed + plan.memory[HOST].kv
    )
    assert plan_runtime(wide, options).memory[HOST].kv <= use.kv // 2
    least = replace(options, kv_memory=use.kv)
    monkeypatch.setattr("infc.runtime.limits.available_memory", lambda: fixed - 100 + 1)
    with pytest.raises(CapacityError, match="of which a step takes"):
        plan_runtime(wide, least)


@pytest.mark.parametrize("weights", ["auto", "mapped", "copied"])
def test_weights_of_a_backend_that_copies_them_are_always_counted(weights: str) -> None:
    plan = plan_runtime(replace(served(), backend="onnx"), RuntimeOptions(weights=weights))
    use = plan.memory[HOST]
    assert (use.weights, use.mapped) == (100, 0)
    assert plan.weights == "loaded"


def test_weights_that_are_copied_anyway_have_to_fit() -> None:
    files = {"weights.safetensors": FileDigest(bytes=1 << 60, sha256="0")}
    large = replace(served(), backend="onnx", files=files)
    options = RuntimeOptions(weights="mapped", kv_memory="1MiB")
    with pytest.raises(CapacityError, match=r"a copy of the weights takes .*\(lower kv_memory"):
        plan_runtime(large, options)
    assert plan_runtime(replace(large, backend="cpp"), options).weights == "mapped"
