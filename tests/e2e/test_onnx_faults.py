"""Models in ONNX with faults that must show: masks, windows, lengths, and memory nobody wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infc.codegen.onnx.caches import CacheForm, Paged, written_name
from infc.codegen.onnx.contrib import GroupedQueries
from infc.codegen.onnx.slots import Slots
from infc.ir.program import Node
from infc.ir.resources import KvGroup
from infc.runtime.executors import onnxruntime_pools as pools_module
from infc.runtime.executors import open_executor
from infc.runtime.executors.base import ExecutorConfig, run_step
from infc.runtime.executors.onnxruntime_feeds import paged_keys, slot_rows

from ..codegen.harness import Chunk, make_step
from ..configs import CONFIGS
from ..emulation.scripted import errors, run_script
from .builds import Build, Builds
from .onnx_builds import BOUND, OWN, SLOTS, poison, reference
from .support import compile_checkpoint, forced_rows, parity_prompts, relative_error

VISIBLE = 100 * BOUND


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values that no step has written are NaN."""
    poison(monkeypatch)


def late_mask(patch: pytest.MonkeyPatch) -> None:
    """Queries see the key behind them as well."""
    positions = Paged.positions

    def plus_one(form: Paged, group: KvGroup) -> tuple[str, str]:
        queries, keys = positions(form, group)
        return form.graph.op("Add", [queries, form.graph.const(1)]), keys

    patch.setattr(Paged, "positions", plus_one)


def wider_window(patch: pytest.MonkeyPatch) -> None:
    """A window of one token more, for which the key is there as well."""
    mask = CacheForm.mask

    def widened(form: CacheForm, group: KvGroup, window: int | None) -> str:
        return mask(form, group, None if window is None else window + 1)

    def keys(step: Any, groups: Any, pieces: Any) -> Any:
        return paged_keys(step, [wider(group) for group in groups], pieces)

    def wider(group: KvGroup) -> KvGroup:
        return group if group.window is None else replace(group, window=group.window + 1)

    patch.setattr(CacheForm, "mask", widened)
    patch.setattr(pools_module, "paged_keys", keys)


def padding_of_nobody(patch: pytest.MonkeyPatch) -> None:
    """Rows of keys are filled up with slots that hold no key: masked, and NaN."""

    def keys(step: Any, groups: Any, pieces: Any) -> Any:
        feeds = paged_keys(step, groups, pieces)
        for group in groups:
            seen = feeds[f"key_positions.{group.name}"] <= step.positions.max()
            feeds[f"key_slots.{group.name}"] *= seen
        return feeds

    patch.setattr(pools_module, "paged_keys", keys)


@pytest.mark.parametrize(
    "plant", [late_mask, wider_window, padding_of_nobody], ids=lambda plant: plant.__name__
)
def test_a_planted_fault_shows(
    plant: Callable[[pytest.MonkeyPatch], None], builds: Builds, tmp_path: Path
) -> None:
    build = Build("gemma2")
    expected = run_script(builds.artifact(reference(build)))
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        artifact = compile_checkpoint(builds.checkpoint(build), tmp_path / "art", backend="onnx")
        if plant is padding_of_nobody:
            with pytest.raises(AssertionError, match="do not follow"):  # nothing follows from NaN
                run_script(artifact)
        else:
            assert max(errors(run_script(artifact), expected)) > VISIBLE


def late_slots(patch: pytest.MonkeyPatch) -> None:
    """Queries see the key behind them as well."""
    positions = Slots.positions

    def plus_one(form: Slots, group: KvGroup) -> tuple[str, str]:
        queries, keys = positions(form, group)
        return form.graph.op("Add", [queries, form.graph.const(1)]), keys

    patch.setattr(Slots, "positions", plus_one)


def unwritten_keys(patch: pytest.MonkeyPatch) -> None:
    """What is not stored in a slot is masked, but not replaced: it is NaN."""

    def read(form: Slots, group: KvGroup, cache: int, part: str) -> str:
        ends = [form.graph.const([0]), f"key_count.{group.name}", form.graph.const([2])]
        return form.graph.op("Slice", [written_name(cache, part), *ends])

    patch.setattr(Slots, "_read", read)


def wider_slots(patch: pytest.MonkeyPatch) -> None:
    """A window of one token more, as the op and as the mask of a layer."""
    mask, attend = CacheForm.mask, GroupedQueries.attend

    def widened(node: Node) -> Node:
        window = node.attrs["window"]
        wider = window + 1 if isinstance(window, int) else None
        return replace(node, attrs={**node.attrs, "window": wider})

    patch.setattr(
        CacheForm, "mask", lambda form, group, window: mask(form, group, window and window + 1)
    )
    patch.setattr(
        GroupedQueries, "attend", lambda form, node, q, sinks: attend(form, widened(node), q, sinks)
    )


def longer_slots(patch: pytest.MonkeyPatch) -> None:
    """`GroupQueryAttention` is told of one key more than a slot has."""

    def rows(step: Any, slots: Any, held: Any) -> Any:
        feeds = slot_rows(step, slots, held)
        longer = ("seqlens_k", "total_length")
        return feeds | {name: feeds[name] + 1 for name in longer}

    patch.setattr(pools_module, "slot_rows", rows)


@pytest.mark.parametrize(
    ("plant", "sets"),
    [
        (late_slots, SLOTS),
        (wider_slots, SLOTS),
        (wider_slots, SLOTS | OWN),
        (longer_slots, SLOTS | OWN),
    ],
    ids=["mask", "window", "own window", "own lengths"],
)
def test_a_fault_planted_in_slots_shows(
    plant: Callable[[pytest.MonkeyPatch], None],
    sets: dict[str, str],
    builds: Builds,
    tmp_path: Path,
) -> None:
    build = Build("gemma2")
    sequences = parity_prompts(build.arch)[:2]
    expected, _ = forced_rows(builds.artifact(reference(build)), sequences)
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        checkpoint, context = builds.checkpoint(build), CONFIGS[build.arch].max_context
        limits: dict[str, Any] = {"runtime.max_context": context}
        artifact = compile_checkpoint(checkpoint, tmp_path / "a", backend="onnx", **limits, **sets)
        found, _ = forced_rows(artifact, sequences)
    assert not max(map(relative_error, found, expected)) < VISIBLE


@pytest.mark.parametrize("is_planted", [False, True], ids=["as it is", "planted"])
def test_slots_are_read_where_a_sequence_has_keys(
    is_planted: bool, builds: Builds, tmp_path: Path
) -> None:
    """A short sequence beside a long one: behind its own keys, memory is NaN."""
    with pytest.MonkeyPatch.context() as patch:
        if is_planted:
            unwritten_keys(patch)
        checkpoint = builds.checkpoint(Build("gemma2"))
        artifact = compile_checkpoint(checkpoint, tmp_path / "a", backend="onnx", **SLOTS)
    groups = artifact.manifest.main.resources
    executor = open_executor(artifact, ExecutorConfig(num_blocks=(3,) * len(groups)))
    shape: dict[str, Any] = {"num_groups": len(groups), "block_size": groups[0].block_size}
    run_step(executor, make_step([Chunk(list(range(40)), 0, [1])], **shape))
    chunks = [Chunk([3], 40, [1]), Chunk([1, 2, 3], 0, [2])]
    logits = run_step(executor, make_step(chunks, **shape)).logits
    executor.close()
    assert np.isfinite(logits).all() != is_planted
