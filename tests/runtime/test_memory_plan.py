"""The memory of engines: by kind, and never planned twice in one process."""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from infc.ir.artifact import open_artifact
from infc.ir.errors import ArtifactError, CapacityError
from infc.ir.manifest import FileDigest, Manifest, WeightsFile
from infc.runtime import opened_parts
from infc.runtime.async_engine import AsyncEngine
from infc.runtime.engine import Engine
from infc.runtime.executors import open_executor
from infc.runtime.executors.address_space import resident_bytes
from infc.runtime.executors.base import HOST, Executor, Running
from infc.runtime.executors.cpp import _address
from infc.runtime.executors.reference import ReferenceExecutor
from infc.runtime.executors.reserve import reserve
from infc.runtime.limits import RuntimePlan, plan_runtime
from infc.runtime.memory_plan import BROKER, Lease, MemoryBroker, MemoryPlan, MemoryUse
from infc.runtime.options import RuntimeOptions
from infc.runtime.scheduling.step import Step

from ..ir.artifacts import manifest
from .small_artifact import write_small_artifact

MIB = 1 << 20
OPTIONS = RuntimeOptions(threads=1)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_artifact(tmp_path_factory.mktemp("memory") / "small")


def free_memory(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """A machine with so much memory, of which nobody touches what he planned."""
    monkeypatch.setattr("infc.runtime.limits.available_memory", lambda: num_bytes)
    monkeypatch.setattr(ReferenceExecutor, "touched_bytes", lambda _: {})


class Touching:
    """An executor that says what it has touched."""

    depth = 0

    def __init__(self, **touched: int) -> None:
        self.touched = touched

    def launch(self, step: Step) -> Running:
        raise NotImplementedError

    def close(self) -> None:
        """Nothing to give back."""

    def touched_bytes(self) -> dict[str, int]:
        return self.touched


plans = st.dictionaries(
    st.sampled_from([HOST, "cuda:0", "cuda:1"]),
    st.builds(
        MemoryUse,
        weights=st.integers(0, 99),
        kv=st.integers(0, 99),
        arena=st.integers(0, 99),
        handed_over=st.integers(0, 99),
        mapped=st.integers(0, 99),
    ),
)


@given(st.lists(st.tuples(plans, st.integers(0, 500), st.sampled_from(["kept", "ended", "lost"]))))
def test_what_is_planned_and_untouched_is_counted_by_kind(
    parts: list[tuple[MemoryPlan, int, str]],
) -> None:
    broker = MemoryBroker()
    kept: list[Lease] = []
    expected = dict.fromkeys([HOST, "cuda:0", "cuda:1"], 0)
    for plan, touched, fate in parts:
        lease = broker.lease(plan)
        lease.watch(Touching(host=touched))
        if fate == "ended":
            lease.end()
            lease.end()
        if fate != "lost":
            kept.append(lease)
        for kind, use in plan.items() if fate == "kept" else ():
            own = use.weights + use.kv + use.arena + use.handed_over
            expected[kind] += max(0, own - touched) if kind == HOST else own
        del lease
    assert {kind: broker.untouched(kind) for kind in expected} == expected


def test_engines_of_one_process_never_plan_more_than_is_free(
    artifact: Path, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    use = plan_runtime(open_artifact(artifact).manifest, OPTIONS).memory[HOST]
    free = 3 * (use.taken + use.mapped)
    free_memory(monkeypatch, free)
    engines: list[Engine] = []
    with contextlib.suppress(CapacityError):
        while len(engines) < 20:
            engines.append(Engine.open(artifact, OPTIONS))
    assert len(engines) < 20, "each of them planned the same memory"
    assert len(engines) > 1, "there is room for two"
    taken = [engine.plan.memory[HOST].taken for engine in engines]
    assert broker.untouched() == sum(taken) <= free
    assert taken == sorted(taken, reverse=True)
    assert taken[-1] < taken[0], "the last of them got less"
    engines.pop(0).close()
    assert broker.untouched() == sum(taken[1:])
    again = Engine.open(artifact, OPTIONS)
    for engine in (*engines, again):
        engine.close()


def test_memory_that_was_asked_for_is_not_promised_twice(
    artifact: Path, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    use = plan_runtime(open_artifact(artifact).manifest, OPTIONS).memory[HOST]
    own = use.kv + use.arena + use.handed_over
    free_memory(monkeypatch, own + own // 2)
    options = RuntimeOptions(threads=1, kv_memory=use.kv, weights="mapped")
    first = Engine.open(artifact, options)
    with pytest.raises(CapacityError, match="that are free"):
        Engine.open(artifact, options)
    first.close()
    Engine.open(artifact, options).close()


def test_what_was_touched_is_not_counted_twice(
    artifact: Path, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.open(artifact, OPTIONS)
    use = engine.plan.memory[HOST]
    assert broker.untouched() == use.taken - use.kv  # torch fills the cache with zeros
    engine.close()


def test_an_engine_that_does_not_open_takes_nothing_and_keeps_nobody_waiting(
    artifact: Path, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ArtifactError("no")

    for name in ("open_executor", "Tokenizer"):
        with monkeypatch.context() as patch:
            target = refuse if name == "open_executor" else type("Bad", (), {"load": refuse})
            patch.setattr(opened_parts, name, target)
            with pytest.raises(ArtifactError, match="no") as kept:
                Engine.open(artifact, OPTIONS)
            assert broker.untouched() == 0, kept
        with ThreadPoolExecutor(1) as beside:
            beside.submit(Engine.open, artifact, OPTIONS).result(10).close()


GIB = 1 << 30


def opened_before(broker: MemoryBroker) -> Lease:
    """Of an engine with 3 GiB of weights and 2 GiB for its cache, which it has not touched."""
    return broker.lease({HOST: MemoryUse(weights=3 * GIB, kv=2 * GIB)})


def large() -> Manifest:
    """3 GiB of weights, and a context that takes 1 GiB of KV memory."""
    base = manifest()
    (group,) = base.main.resources
    files = {"weights.safetensors": FileDigest(bytes=3 * GIB, sha256="0")}
    context = GIB // group.bytes_per_block() * group.block_size
    limits = replace(base.main.limits, max_context=context)
    return replace(base.with_main(limits=limits), files=files)


@pytest.mark.parametrize("weights", [None, "auto", "mapped"])
def test_the_same_model_opens_once_more_with_mapped_weights(
    weights: Any, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell of a notebook that is run again: the first engine lives until the second is there."""
    free_memory(monkeypatch, 8 * GIB)
    options = RuntimeOptions(threads=1, weights=weights)
    first = opened_before(broker)
    plan = plan_runtime(large(), options)
    assert (plan.weights, plan.notes) == ("mapped", ())
    assert plan.limits.max_context == large().main.limits.max_context
    assert plan.memory[HOST].taken <= 3 * GIB
    first.end()
    if weights != "mapped":
        assert plan_runtime(large(), options).weights != "mapped"


def test_the_cell_of_a_notebook_opens_twice(
    artifact: Path, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RuntimeOptions(threads=1, max_context=96, kv_memory="auto")
    use = plan_runtime(open_artifact(artifact).manifest, options).memory[HOST]
    free_memory(monkeypatch, use.weights + use.handed_over + 2 * use.kv)
    engine = Engine.open(artifact, options)
    assert engine.plan.weights == "loaded"
    again = Engine.open(artifact, options)
    assert again.plan.weights == "mapped"
    again.close()
    engine.close()


@pytest.mark.parametrize(
    ("options", "ours"),
    [
        (RuntimeOptions(threads=1), False),
        (RuntimeOptions(threads=1, weights="copied"), True),
        (RuntimeOptions(threads=1, weights="copied", kv_memory="2GiB"), True),
        (RuntimeOptions(threads=1, kv_memory="4GiB"), True),
    ],
)
def test_an_error_names_the_other_engines(
    options: RuntimeOptions, ours: bool, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_memory(monkeypatch, 8 * GIB)
    first = opened_before(broker)
    cause = "; other engines of this process have planned 5.0 GiB: close one)"
    with pytest.raises(CapacityError, match=re.escape(cause) + "$"):
        plan_runtime(large(), options, weights_are_ours=ours)
    first.end()
    assert plan_runtime(large(), options, weights_are_ours=ours).notes == ()
    free_memory(monkeypatch, GIB // 2)
    with pytest.raises(CapacityError) as alone:
        plan_runtime(large(), options, weights_are_ours=ours)
    assert "other engines" not in str(alone.value)


def test_shared_weights_that_are_loaded_leave_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program of 1 GiB beside the 3 GiB of the main one, whose file others can write to."""
    base = large()
    weights = WeightsFile("programs/draft/weights.safetensors", ("a", "b"), ("b",))
    draft = replace(base.main, weights=weights)
    files = {**base.files, weights.file: FileDigest(bytes=GIB, sha256="0")}
    base = replace(base, programs={**base.programs, "draft": draft}, files=files)

    def plan(free: int, *, ours: bool = False, **options: Any) -> RuntimePlan:
        free_memory(monkeypatch, free)
        chosen = RuntimeOptions(threads=1, **options)
        return plan_runtime(base, chosen, weights_are_ours=ours, program="draft")

    for free in range(2 * GIB, 12 * GIB, GIB // 4):
        try:
            host = plan(free).memory[HOST]
        except (ArtifactError, CapacityError):
            continue
        assert host.weights == 4 * GIB and host.mapped == 0
        assert host.taken <= free
    assert plan(8 * GIB).notes == ()
    assert plan(4 * GIB, ours=True).memory[HOST].mapped >= 3 * GIB
    with pytest.raises(CapacityError, match=r"shared with the main program take 3.0 GiB, as"):
        plan(3 * GIB)
    with pytest.raises(CapacityError, match=r"of which a step takes .*, and shared weights 3.0 G"):
        plan(7 * GIB // 2, kv_memory="2GiB")
    with pytest.raises(CapacityError, match=r"a copy of the weights takes 1.0 GiB, but only"):
        plan(9 * GIB // 2, kv_memory="1GiB", weights="copied")


def test_a_shorter_context_names_the_other_engines(
    broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    free_memory(monkeypatch, 6 * GIB)
    first = opened_before(broker)
    (note,) = plan_runtime(large(), OPTIONS).notes
    assert note.startswith("max_context is reduced to ")
    assert note.endswith("; other engines of this process have planned 5.0 GiB: close one")
    first.end()
    assert plan_runtime(large(), OPTIONS).notes == ()


def test_two_threads_plan_one_after_the_other(
    artifact: Path, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    use = plan_runtime(open_artifact(artifact).manifest, OPTIONS).memory[HOST]
    own = use.kv + use.arena + use.handed_over
    free_memory(monkeypatch, own + own // 2)
    together = threading.Barrier(4)
    options = RuntimeOptions(threads=1, kv_memory=use.kv, weights="mapped")

    def attempt(_: int) -> Engine | None:
        together.wait()
        try:
            return Engine.open(artifact, options)
        except CapacityError:
            return None

    with ThreadPoolExecutor(4) as pool:
        opened = [one for one in pool.map(attempt, range(4)) if one is not None]
    assert len(opened) == 1
    opened[0].close()


def test_what_an_engine_fills_while_it_loads_is_not_counted_twice(
    artifact: Path, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is open, it cannot say what it has filled: others plan only then."""
    use = plan_runtime(open_artifact(artifact).manifest, OPTIONS).memory[HOST]
    free = [3 * use.taken]
    monkeypatch.setattr("infc.runtime.limits.available_memory", lambda: free[0])
    monkeypatch.setattr(ReferenceExecutor, "touched_bytes", lambda _: {HOST: use.taken})
    loading, second_plans = threading.Event(), threading.Event()
    options = replace(OPTIONS, kv_memory=use.kv)

    def load(*given: Any) -> Executor:
        free[0] -= use.taken
        if not loading.is_set():
            loading.set()
            second_plans.wait(0.2)
        return open_executor(*given)

    def plan(*given: Any, **settings: Any) -> RuntimePlan:
        if loading.is_set():
            second_plans.set()
        return plan_runtime(*given, **settings)

    monkeypatch.setattr(opened_parts, "open_executor", load)
    monkeypatch.setattr(opened_parts, "plan_runtime", plan)
    with ThreadPoolExecutor(1) as beside:
        first = beside.submit(Engine.open, artifact, options)
        loading.wait()
        second = Engine.open(artifact, options)
    assert free == [use.taken] and broker.untouched() == 0
    assert first.result().plan == second.plan
    first.result().close()
    second.close()


def in_a_fork(check: Callable[[], None]) -> None:
    """Run it in a forked process, which is ended where it hangs."""
    child = os.fork()
    if child == 0:
        code = 1
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
        try:
            check()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking where there are threads
def test_shutting_down_in_a_fork_ends_the_lease(artifact: Path, broker: MemoryBroker) -> None:
    served = AsyncEngine(Engine.open(artifact, OPTIONS))
    planned = broker.untouched()
    assert planned > 0

    def check() -> None:
        assert broker.untouched() == planned, "this broker is not told of forks"
        served.shutdown()
        assert broker.untouched() == 0

    in_a_fork(check)
    assert broker.untouched() == planned
    served.shutdown()
    assert broker.untouched() == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forking where there are threads
def test_a_fork_waits_for_no_thread_of_its_parent(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a thread that opens an engine, or counts, the fork has the locks alone."""
    for module in ("opened_parts", "limits"):  # the one that is told of forks
        monkeypatch.setattr(f"infc.runtime.{module}.BROKER", BROKER)
    counting, forked = threading.Event(), threading.Event()

    class Slow(Touching):
        def touched_bytes(self) -> dict[str, int]:
            if threading.current_thread() is not threading.main_thread():
                counting.set()
                forked.wait()
            return {}

    lease = BROKER.lease({HOST: MemoryUse(kv=1 << 50)})
    lease.watch(Slow())
    monkeypatch.setattr(opened_parts, "open_executor", lambda *_: Touching())

    def open_one() -> None:
        with BROKER.opening():
            BROKER.untouched()

    def check() -> None:
        engine = Engine.open(artifact, OPTIONS)
        assert BROKER.untouched() == engine.plan.memory[HOST].taken, "it starts with no lease"
        lease.end()
        engine.close()
        assert BROKER.untouched() == 0

    thread = threading.Thread(target=open_one)
    thread.start()
    counting.wait()
    try:
        in_a_fork(check)
        forked.set()  # until then the thread holds the lock
        assert BROKER.untouched() >= 1 << 50, "the parent has its leases as before"
    finally:
        forked.set()
        thread.join()
        lease.end()


def test_pages_are_counted_once_they_are_touched() -> None:
    memory = reserve(64 * MIB)
    address = _address(memory)
    assert resident_bytes(address, len(memory)) == 0
    memory[20 * MIB] = 1
    assert mmap.PAGESIZE <= resident_bytes(address, len(memory)) <= 2 * MIB
    np.frombuffer(memory, np.uint8)[:] = 1
    assert resident_bytes(address, len(memory)) == 64 * MIB
