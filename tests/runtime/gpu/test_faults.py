"""What goes wrong with a GPU: one clear error each, and nothing stays open."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infc.ir.artifact import Artifact
from infc.ir.errors import ArtifactError, CapacityError, DeviceError, InfcError
from infc.ir.launches import Extent, Integer, Kernel, LaunchPlan, Pointer
from infc.runtime.async_engine import AsyncEngine
from infc.runtime.engine import Engine
from infc.runtime.executors import open_executor
from infc.runtime.executors.base import run_step
from infc.runtime.executors.gpu.executor import GpuExecutor
from infc.runtime.executors.gpu.weights import CHUNK_BYTES, DeviceWeights

from .late_driver import LateDriver
from .launched_model import SEQUENCES, make_plan, write_launched_artifact
from .steps import Steps, chunk
from .test_executor import CONFIG, engine_over


def write(path: Path, plan: LaunchPlan | None = None, **changes: Any) -> Artifact:
    return write_launched_artifact(path / "model", plan or make_plan(), **changes)


def run(engine: Engine) -> None:
    """A few steps."""
    for _ in range(4):
        engine.step()


def test_without_a_driver_opening_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise DeviceError("there is no NVIDIA driver on this machine")

    monkeypatch.setattr("infc.runtime.executors.gpu.cuda.load_bindings", none)
    with pytest.raises(DeviceError, match="there is no NVIDIA driver"):
        open_executor(write(tmp_path), CONFIG)


def test_machine_code_of_another_chip_is_refused(tmp_path: Path) -> None:
    driver = LateDriver().with_device(capability=(8, 0))
    with pytest.raises(DeviceError) as raised:
        GpuExecutor.open_with(write(tmp_path), CONFIG, driver)
    assert "the artifact was compiled for sm_90, this GPU is sm_80" in str(raised.value)
    assert "infc rebuild ARTIFACT --target sm_80" in str(raised.value)
    assert not driver.names, "nothing is allocated"


def test_code_for_one_chip_alone_is_of_that_chip(tmp_path: Path) -> None:
    driver = LateDriver()
    executor = GpuExecutor.open_with(write(tmp_path, make_plan(target="sm_90a")), CONFIG, driver)
    assert driver.names, "it was opened"
    executor.close()
    assert driver.is_closed


def test_too_little_memory_is_told_before_anything_is_read(tmp_path: Path) -> None:
    driver = LateDriver().with_device(free_bytes=100_000)
    with pytest.raises(CapacityError, match=r"97\.7 KiB of memory free.*weights .*KV cache"):
        GpuExecutor.open_with(write(tmp_path), CONFIG, driver)
    assert not driver.names


def test_a_missing_file_of_machine_code_is_named(tmp_path: Path) -> None:
    kernel = Kernel("embed", "code/kernels/other.cubin", "code/kernels/embed.ptx", 32, 0)
    plan = make_plan()
    plan = replace(plan, kernels={**plan.kernels, "embed": kernel})
    with pytest.raises(ArtifactError, match=r"name code/kernels/other\.cubin"):
        GpuExecutor.open_with(write(tmp_path, plan), CONFIG, LateDriver())


@pytest.mark.parametrize(
    "pointer",
    [
        Pointer("weight", "d"),
        Pointer("state", "other"),
        Pointer("output", "other"),
        Pointer("step", "other"),
        Pointer("step", "block_table:other"),
    ],
)
def test_launches_that_name_what_there_is_not_are_refused(tmp_path: Path, pointer: Pointer) -> None:
    plan = make_plan()
    form = plan.forms[0]
    launch = replace(form.launches[3], arguments=(pointer, pointer))
    form = replace(form, launches=(*form.launches, launch))
    with pytest.raises(ArtifactError, match=f"names '{pointer.name}' of {pointer.space}"):
        GpuExecutor.open_with(
            write(tmp_path, replace(plan, forms=(form, *plan.forms[1:]))), CONFIG, LateDriver()
        )


def test_block_tables_are_as_wide_as_contexts_are_long(tmp_path: Path) -> None:
    plan = make_plan(table_width={"full": 16, "window": 3})
    with pytest.raises(ArtifactError, match="no block table of 16 blocks for group window"):
        GpuExecutor.open_with(write(tmp_path, plan), CONFIG, LateDriver())


def test_a_weight_that_is_not_in_the_file_is_named(tmp_path: Path) -> None:
    artifact = write(tmp_path)
    program = artifact.manifest.main
    weights = replace(program.weights, tensors=("a", "z"))
    with pytest.raises(ArtifactError, match="z: is not in the file"):
        DeviceWeights(artifact, replace(program, weights=weights))


def test_a_file_of_weights_that_is_cut_short_is_no_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = write(tmp_path)
    weights = DeviceWeights(artifact, artifact.manifest.main)
    monkeypatch.setattr("infc.runtime.executors.gpu.weights.CHUNK_BYTES", 4096)
    os.truncate(artifact.weights_path, 8192)
    with pytest.raises(ArtifactError, match="was truncated"):
        weights.upload(LateDriver())
    weights.close()
    assert CHUNK_BYTES > 4096


def test_a_lost_gpu_ends_requests_with_one_error_and_the_engine_closes(tmp_path: Path) -> None:
    driver = LateDriver()
    executor = GpuExecutor.open_with(write(tmp_path), CONFIG, driver)
    engine = engine_over(executor)
    engine.add_request("first", [1, 2, 3])
    run(engine)
    driver.fail_kernels = 2
    with pytest.raises(DeviceError, match="the GPU was lost"):
        run(engine)
    engine.add_request("second", [4, 5])
    with pytest.raises(DeviceError, match=r"failed in an earlier step: the GPU was lost.*again"):
        run(engine)
    engine.close()
    engine.close()
    assert driver.is_closed


def test_a_step_behind_one_that_failed_fails_too(tmp_path: Path) -> None:
    driver = LateDriver()
    executor = GpuExecutor.open_with(write(tmp_path), CONFIG, driver)
    steps = Steps()
    first, second = executor.launch(steps.decode(2)), executor.launch(steps.decode(2))
    driver.fail_kernels = 0
    for running in (first, second, first):
        with pytest.raises(DeviceError, match="the GPU"):
            running.result()
    with pytest.raises(DeviceError, match="in an earlier step"):
        executor.launch(steps.decode(1))
    executor.close()


def test_masks_for_a_gpu_that_was_lost_are_refused(tmp_path: Path) -> None:
    driver = LateDriver()
    executor = GpuExecutor.open_with(write(tmp_path), CONFIG, driver)
    steps = Steps()
    step = steps.of([1] * 2, draws=2, adjusted=True)
    assert step.adjustments is not None
    masks = step.adjustments.masks
    first = executor.launch(steps.decode(1))
    late = executor.launch(replace(step, adjustments=replace(step.adjustments, masks=masks[:0])))
    driver.fail_kernels = 0
    with pytest.raises(DeviceError, match="was lost"):
        first.result()
    with pytest.raises(DeviceError, match="in an earlier step"):
        executor.give_masks(late, masks)
    executor.close()


def test_steps_beyond_the_limits_are_refused(tmp_path: Path) -> None:
    executor = GpuExecutor.open_with(write(tmp_path), CONFIG, LateDriver())
    with pytest.raises(CapacityError, match="T = 17 exceeds the compiled limit 16"):
        executor.launch(Steps().of([9, 8]))
    with pytest.raises(CapacityError, match=f"D = {SEQUENCES + 1} exceeds"):
        executor.launch(Steps().of([1], draws=SEQUENCES + 1))
    step = Steps().of([1])
    far = replace(step, context_lengths=np.array([65], np.int32))
    with pytest.raises(CapacityError, match="a context of 65 tokens exceeds the compiled limit 64"):
        executor.launch(far)
    wide = replace(step, block_tables=tuple(np.zeros((1, 17), np.int32) for _ in range(2)))
    with pytest.raises(CapacityError, match="17 blocks of a sequence in group full exceeds"):
        executor.launch(wide)
    executor.launch(step).result()
    executor.close()


def one_wrong(**changes: Any) -> LaunchPlan:
    """A plan with another fourth launch of its first form."""
    plan = make_plan()
    form = plan.forms[0]
    launches = list(form.launches)
    launches[3] = replace(launches[3], **changes)
    return replace(plan, forms=(replace(form, launches=tuple(launches)), *plan.forms[1:]))


def fewer_forms() -> LaunchPlan:
    plan = make_plan()
    return replace(plan, forms=plan.forms[:3])


WRONG_PLANS = {
    "fewer-forms": (fewer_forms, "do not have all forms: no form is for 16 tokens"),
    "unknown-size": (
        lambda: one_wrong(grid=(Extent(1, "X"),)),
        r"depend on 'X', which is no size of a step: forms\.\S+\.launches\[3\]",
    ),
    "too-many-blocks": (
        lambda: one_wrong(grid=(Extent(1), Extent(70000, "B"))),
        r"have a grid of \d+ blocks, and a GPU has at most 65535",
    ),
    "fewer-than-none": (
        lambda: one_wrong(grid=(Extent(1, "B", -99),)), r"have a grid of -\d+ blocks"
    ),
    "too-large-a-number": (
        lambda: one_wrong(arguments=(Integer(Extent(1 << 31)),)), "pass 2147483648 as an integer"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_PLANS)
def test_launches_that_do_not_fit_the_limits_are_refused(name: str, tmp_path: Path) -> None:
    make, message = WRONG_PLANS[name]
    driver = LateDriver()
    with pytest.raises(ArtifactError, match=f"the launches {message}"):
        GpuExecutor.open_with(write(tmp_path, make()), CONFIG, driver)
    assert not driver.names, "nothing is allocated"


def test_neither_a_closed_executor_nor_a_forked_process_runs_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = LateDriver()
    executor = GpuExecutor.open_with(write(tmp_path), CONFIG, driver)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(InfcError, match="before this process was forked"):
            executor.launch(chunk(2))
        executor.close()
        assert not driver.is_closed, "the GPU is the parent's"
    with pytest.raises(InfcError, match="the engine is closed"):
        executor.launch(chunk(2))


def test_after_an_upload_that_was_not_made_tables_are_sent_again(tmp_path: Path) -> None:
    """Else the device would lack blocks that the host takes it to have."""
    driver = LateDriver()
    executor = GpuExecutor.open_with(write(tmp_path), CONFIG, driver)
    steps, before = Steps(), Steps()
    upload, asked = driver.upload, []

    def interrupted(address: int, source: Any) -> None:
        asked.append(address)
        if len(asked) == 2:
            raise KeyboardInterrupt
        upload(address, source)

    driver.upload = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        executor.launch(before.decode(3))
    driver.upload = upload  # type: ignore[method-assign]
    run_step(executor, steps.decode(3))
    executor.close()


def test_a_capture_that_is_interrupted_ends(tmp_path: Path) -> None:
    driver = LateDriver()
    executor = GpuExecutor.open_with(write(tmp_path), CONFIG, driver)
    launch = driver.launch

    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    driver.launch = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        executor.launch(Steps().decode(3))
    driver.launch = launch  # type: ignore[method-assign]
    assert run_step(executor, Steps().decode(3)).tokens.shape == (3,)
    executor.close()


def test_a_served_engine_ends_with_its_gpu(tmp_path: Path) -> None:
    """All who wait hear why, later requests too, and it is no longer healthy."""
    driver = LateDriver()
    engine = engine_over(GpuExecutor.open_with(write(tmp_path), CONFIG, driver))
    served = AsyncEngine(engine)

    async def read() -> None:
        async for _ in served.generate([1, 2, 3]):
            driver.fail_kernels = 3

    async def ask() -> str:
        with pytest.raises(InfcError) as raised:
            await read()
        return str(raised.value)

    async def both() -> list[str]:
        return [await asyncio.wait_for(ask(), 30) for _ in range(2)]

    first, second = asyncio.run(both())
    assert "DeviceError: the GPU was lost (CUDA_ERROR_DEVICE_LOST)" in first
    assert first == second
    assert not served.healthy
    served.shutdown()
    assert driver.is_closed
