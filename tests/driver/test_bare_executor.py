"""Executors without an engine: their memory is planned as that of engines is."""

from __future__ import annotations

from pathlib import Path

import pytest

from infc.driver.bare_executor import open_bare
from infc.ir.artifact import Artifact, open_artifact
from infc.ir.manifest import Manifest
from infc.runtime import executors
from infc.runtime.executors.base import HOST, run_step
from infc.runtime.executors.reference import ReferenceExecutor
from infc.runtime.limits import plan_runtime
from infc.runtime.memory_plan import BROKER, MemoryBroker, MemoryUse
from infc.runtime.options import RuntimeOptions

from ..codegen.harness import Chunk, make_step
from ..runtime.small_artifact import BLOCK, write_small_artifact

NUM_BLOCKS = (9, 5)


@pytest.fixture(autouse=True)
def broker(monkeypatch: pytest.MonkeyPatch) -> MemoryBroker:
    """One that knows of no engine of other tests; executors say that they touched nothing."""
    fresh = MemoryBroker()
    for module in ("memory_plan", "opened_parts", "limits"):
        monkeypatch.setattr(f"infc.runtime.{module}.BROKER", fresh)
    monkeypatch.setattr(ReferenceExecutor, "touched_bytes", lambda _: {})
    return fresh


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    return open_artifact(write_small_artifact(tmp_path / "small"))


def cache_bytes(manifest: Manifest) -> int:
    counts = zip(manifest.main.resources, NUM_BLOCKS, strict=True)
    return sum(count * group.bytes_per_block() for group, count in counts)


def test_engines_do_not_plan_what_it_takes(artifact: Artifact, broker: MemoryBroker) -> None:
    manifest = artifact.manifest
    engine = plan_runtime(manifest, RuntimeOptions(threads=1)).memory[HOST]
    assert engine.weights > 0
    with open_bare(artifact, NUM_BLOCKS, num_threads=1) as executor:
        step = make_step([Chunk([1, 2, 3], 0, [1])], num_groups=2, block_size=BLOCK)
        assert run_step(executor, step).logits.shape[1] == manifest.model.vocab_size
        taken = engine.weights + engine.arena + engine.handed_over + cache_bytes(manifest)
        assert broker.untouched() == taken
    assert broker.untouched() == 0


def test_what_does_not_open_takes_nothing(
    artifact: Artifact, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        assert broker.untouched() > 0
        raise MemoryError

    monkeypatch.setattr(executors, "open_executor", refuse)
    with pytest.raises(MemoryError) as kept, open_bare(artifact, NUM_BLOCKS):
        pass
    assert broker.untouched() == 0, kept


def test_what_fails_within_is_closed(artifact: Artifact, broker: MemoryBroker) -> None:
    with pytest.raises(ZeroDivisionError), open_bare(artifact, NUM_BLOCKS):
        raise ZeroDivisionError
    assert broker.untouched() == 0


def test_weights_are_copied_where_cache_and_other_engines_leave_memory_for_them(
    artifact: Artifact, broker: MemoryBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    use = plan_runtime(artifact.manifest, RuntimeOptions(threads=1)).memory[HOST]
    fixed = use.arena + use.handed_over + cache_bytes(artifact.manifest)

    def placed(free: int) -> int:
        """The weights that it takes where so many bytes are free."""
        monkeypatch.setattr("infc.runtime.limits.available_memory", lambda: free)
        with open_bare(artifact, NUM_BLOCKS, num_threads=1):
            return broker.untouched() - before - fixed

    before = 0
    assert placed(fixed + 2 * use.weights) == use.weights
    assert placed(fixed + use.weights) == 0
    lease = broker.lease({HOST: MemoryUse(kv=use.weights)})
    before = broker.untouched()
    assert placed(fixed + 2 * use.weights) == 0
    lease.end()


def test_the_broker_is_that_of_the_process(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    before = BROKER.untouched()
    with open_bare(artifact, NUM_BLOCKS, num_threads=1):
        assert BROKER.untouched() > before
