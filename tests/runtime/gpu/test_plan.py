"""The memory plan of an artifact for a GPU: weights, cache and step are in the GPU's memory."""

from __future__ import annotations

import pytest

from infc.ir.artifact import Artifact
from infc.ir.errors import CapacityError, DeviceError
from infc.runtime import limits, opened_parts
from infc.runtime.engine import Engine
from infc.runtime.executors.base import DEVICE, HOST, ExecutorConfig
from infc.runtime.executors.gpu.executor import GpuExecutor
from infc.runtime.limits import handed_over_bytes, plan_runtime
from infc.runtime.memory_plan import BROKER
from infc.runtime.options import RuntimeOptions
from infc.runtime.scheduling.kv_groups import planned_bytes

from .late_driver import LateDriver
from .launched_model import GROUPS, make_plan, write_launched_artifact

AUTO = RuntimeOptions(kv_memory="auto")
MIB = 1 << 20


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return write_launched_artifact(tmp_path_factory.mktemp("plan") / "model", make_plan())


def test_a_plan_is_made_for_a_gpu_that_is_not_here(artifact: Artifact) -> None:
    plan = plan_runtime(artifact.manifest, AUTO, device_bytes=80 << 30)
    on_gpu, on_host = plan.memory[DEVICE], plan.memory[HOST]
    assert on_gpu.kv == planned_bytes(GROUPS, plan.num_blocks)
    assert on_gpu.weights == artifact.manifest.files["weights.safetensors"].bytes
    assert on_host.taken == on_host.handed_over == handed_over_bytes(artifact.manifest.main, 16)
    assert plan.weights == "loaded"


def test_what_is_planned_is_what_the_executor_takes(artifact: Artifact) -> None:
    plan = plan_runtime(artifact.manifest, AUTO, device_bytes=MIB)
    executor = GpuExecutor.open_with(
        artifact, ExecutorConfig(num_blocks=plan.num_blocks), LateDriver()
    )
    planned, taken = plan.memory[DEVICE].taken, executor.touched_bytes()[DEVICE]
    # The file of weights has a header and filler, which the GPU does not get.
    assert taken <= planned <= taken + 4096
    executor.close()


def test_the_cache_takes_most_of_what_weights_and_a_step_leave(artifact: Artifact) -> None:
    whole = plan_runtime(artifact.manifest, AUTO, device_bytes=80 << 30).memory[DEVICE]
    free = whole.taken - whole.kv // 3
    plan = plan_runtime(artifact.manifest, AUTO, device_bytes=free)
    left = free - (whole.taken - whole.kv)
    assert 0.6 * left < plan.memory[DEVICE].kv <= 0.9 * left
    assert plan.memory[DEVICE].taken <= free


def test_what_does_not_fit_is_refused_with_what_it_takes(artifact: Artifact) -> None:
    with pytest.raises(CapacityError, match=r"the GPU has 9\.8 KiB of memory free, and the weig"):
        plan_runtime(artifact.manifest, AUTO, device_bytes=10_000)
    whole = plan_runtime(artifact.manifest, AUTO, device_bytes=80 << 30).memory[DEVICE]
    least = whole.taken - whole.kv
    with pytest.raises(CapacityError, match="exceeds the"):
        plan_runtime(
            artifact.manifest, RuntimeOptions(kv_memory="64KiB"), device_bytes=least + 1000
        )


def test_without_a_gpu_an_engine_says_so(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> int:
        raise DeviceError("the NVIDIA driver finds no GPU")

    monkeypatch.setattr("infc.ir.nvidia.free_gpu_bytes", none)
    with pytest.raises(DeviceError, match="finds no GPU"):
        Engine.open(artifact.path)


def test_a_second_engine_gets_what_the_first_left(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first has taken its memory, which the driver no longer calls free."""
    drivers: list[LateDriver] = []

    def opened(artifact: Artifact, config: ExecutorConfig) -> GpuExecutor:
        drivers.append(LateDriver())
        return GpuExecutor.open_with(artifact, config, drivers[-1])

    def free() -> int:
        return 2 * MIB - sum(driver.memory.num_bytes for driver in drivers if not driver.is_closed)

    monkeypatch.setattr("infc.ir.nvidia.free_gpu_bytes", free)
    monkeypatch.setattr(opened_parts, "open_executor", opened)
    before = limits.free_bytes(DEVICE)
    first = Engine.open(artifact.path)
    left = limits.free_bytes(DEVICE)
    assert left <= free() <= left + 4096, "what the first has taken counts once"
    assert left < before
    second = Engine.open(artifact.path)
    for engine in (first, second):
        engine.add_request("one", [1, 2, 3])
        while engine.has_unfinished:
            engine.step()
        engine.close()
    assert limits.free_bytes(DEVICE) == before
    assert BROKER.untouched(DEVICE) == 0
