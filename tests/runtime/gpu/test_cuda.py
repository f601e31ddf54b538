"""The driver's calls: the right ones with the right arguments, and its errors in words."""

from __future__ import annotations

import inspect
import re
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver as real

from infc.codegen.triton.backend import TritonBackend
from infc.ir import nvidia
from infc.ir.artifact import Artifact
from infc.ir.errors import CapacityError, DeviceError, TargetError
from infc.runtime.executors.base import ExecutorConfig
from infc.runtime.executors.gpu import cuda
from infc.runtime.executors.gpu.cuda import CudaDriver
from infc.runtime.executors.gpu.driver import Driver, MatrixMap
from infc.runtime.executors.gpu.executor import GpuExecutor

from .launched_model import make_plan, write_launched_artifact
from .recorded_bindings import RecordedCalls, recorded
from .test_executor import NUM_BLOCKS, answers, engine_over, same

Code = real.CUresult


def opened(**options: Any) -> tuple[CudaDriver, RecordedCalls]:
    bindings, calls = recorded(**options)
    return CudaDriver(bindings=bindings), calls


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> Callable[[object], None]:
    """Puts something in the place of the module `cuda.bindings.driver`."""

    def put(module: object) -> None:
        monkeypatch.setitem(sys.modules, "cuda.bindings.driver", module)

    return put


def test_a_device_is_described() -> None:
    driver, calls = opened()
    device = driver.device
    assert (device.name, device.capability, device.num_processors) == ("Test GPU", (9, 0), 132)
    assert (device.memory_bytes, device.free_bytes) == (1 << 31, 1 << 30)
    as_driver: Driver = driver
    as_driver.close()
    as_driver.close()
    assert calls.contexts == 0 and not any(calls.live.values())


def test_copies_go_both_ways_and_memory_is_given_back() -> None:
    driver, calls = opened()
    address = driver.allocate(64, "a test")
    assert address % 256 == 0
    source, target = driver.host_array(64), driver.host_array(64)
    source[:] = np.arange(64)
    driver.upload(address, source)
    driver.download(target, address)
    event = driver.record_event()
    assert driver.has_passed(event)
    driver.wait(event)
    assert target.tolist() == list(range(64))
    driver.copy(address + 32, address, 32)
    driver.download(target, address)
    assert target.tolist() == [*range(32), *range(32)]
    assert driver.stream == int(driver._stream)
    driver.fill(address, 64, 3)
    driver.download(target, address)
    assert set(target.tolist()) == {3}
    driver.free_host_array(target)
    assert len(calls.live["host"]) == 1
    driver.upload(address, source[:0])
    driver.free(address)
    driver.allocate(32, "what is left to close")
    driver.close()
    assert calls.contexts == 0 and not any(calls.live.values())


def test_events_are_used_again() -> None:
    driver, calls = opened()
    for _ in range(5):
        driver.wait(driver.record_event())
    held = [driver.record_event() for _ in range(3)]
    assert calls.calls.count("cuEventCreate") == 3
    calls.results["cuEventQuery"] = Code.CUDA_ERROR_NOT_READY
    assert not driver.has_passed(held[0])


def test_timed_events_are_of_their_own() -> None:
    driver, calls = opened()
    driver.wait(driver.record_event())
    for _ in range(2):
        first, second = (driver.record_event(timed=True) for _ in range(2))
        driver.wait(second)
        assert driver.seconds_between(first, second) == 0.25e-3  # the driver tells milliseconds
        del first, second
    assert calls.calls.count("cuEventCreate") == 3
    driver.close()
    assert not calls.live["event"]


def test_each_thread_enters_the_context_once() -> None:
    driver, calls = opened()
    before = calls.calls.count("cuCtxSetCurrent")

    def work() -> None:
        for _ in range(3):
            driver.synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert calls.calls.count("cuCtxSetCurrent") == before + 1


def test_kernels_are_launched_with_one_buffer_of_parameters() -> None:
    driver, calls = opened()
    usual = driver.load(b"one image", "", "embed", 128, 1024)
    large = driver.load(b"one image", "", "embed", 128, 100 << 10)
    assert calls.calls.count("cuLibraryLoadData") == 1
    assert f"cuFuncSetAttribute {100 << 10}" in calls.calls
    assert calls.calls.count("cuFuncLoad") == 2
    tokens, out = driver.allocate(8, "tokens"), driver.allocate(16, "out")
    given, found = driver.host_array(8), driver.host_array(16)
    given.view(np.int32)[:] = (5, 6)
    driver.upload(tokens, given)
    parameters = b"".join(one.to_bytes(8, "little") for one in (tokens, out, 0, 0))
    driver.launch(usual, (2,), parameters)
    driver.download(found, out)
    assert found.view(np.int64).tolist() == [5, 6]
    driver.launch(large, (2, 1), parameters, dependent=True)
    assert calls.calls[-1] == "cuLaunchKernelEx"
    with pytest.raises(DeviceError, match=r"takes 300\.0 KiB of shared memory, and a block of"):
        driver.load(b"one image", "", "embed", 128, 300 << 10)


def test_a_graph_runs_what_was_captured_and_goes_when_nobody_holds_it() -> None:
    driver, calls = opened()
    function = driver.load(b"image", "", "embed", 32, 0)
    tokens, out = driver.allocate(4, "tokens"), driver.allocate(8, "out")
    driver.fill(tokens, 4, 0)
    driver.fill(out, 8, 1)
    driver.begin_capture()
    parameters = b"".join(one.to_bytes(8, "little") for one in (tokens, out, 0, 0))
    driver.launch(function, (1,), parameters)
    graph = driver.end_capture()
    assert calls.calls[-1] == "cuGraphDestroy"
    found = driver.host_array(8)
    driver.download(found, out)
    assert found.tolist() == [1] * 8
    driver.replay(graph)
    driver.download(found, out)
    assert found.tolist() == [0] * 8
    del graph
    assert "cuGraphExecDestroy" in calls.calls


def test_descriptors_have_the_innermost_dimension_first() -> None:
    driver, calls = opened()
    matrix = MatrixMap(4096, "bf16", (10, 64), (8, 32), 64)
    assert len(driver.descriptor(matrix)) == 128
    expected = "CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 at 4096: [[64, 10], [128], [32, 8]]"
    assert f"{expected} CU_TENSOR_MAP_SWIZZLE_64B" in calls.calls


def test_a_whole_engine_runs_over_these_calls(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same answers as over a driver that is known to be right."""
    from .late_driver import LateDriver

    artifact: Artifact = write_launched_artifact(
        tmp_path_factory.mktemp("cuda") / "model", make_plan()
    )
    config = ExecutorConfig(num_blocks=NUM_BLOCKS)
    driver, calls = opened()
    found = answers(engine_over(GpuExecutor.open_with(artifact, config, driver)))
    expected = answers(engine_over(GpuExecutor.open_with(artifact, config, LateDriver())))
    same(found, expected)
    assert calls.contexts == 0 and not any(calls.live.values())
    assert calls.calls.count("cuGraphInstantiate") == calls.calls.count("cuGraphDestroy") > 0


# Errors


def test_without_bindings(loading: Callable[[object], None]) -> None:
    loading(None)
    with pytest.raises(DeviceError, match=r"cuda-bindings is not installed .*infc\[cuda\]"):
        CudaDriver()


def test_without_a_driver(loading: Callable[[object], None]) -> None:
    """As the bindings say it themselves where there is no libcuda.so.1."""
    calls = RecordedCalls()

    def no_library(flags: int) -> None:
        raise RuntimeError("libcuda.so.1 cannot be loaded\nand a second line")

    calls.cuInit = no_library  # type: ignore[assignment, method-assign]
    loading(calls)
    with pytest.raises(
        DeviceError, match=r"there is no NVIDIA driver \(libcuda.so.1\) on"
    ) as raised:
        CudaDriver()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("by", ["cuInit", "count"])
def test_without_a_gpu(
    loading: Callable[[object], None], monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    calls = RecordedCalls(count=0)
    if by == "cuInit":
        calls.results["cuInit"] = Code.CUDA_ERROR_NO_DEVICE
    loading(calls)
    with pytest.raises(DeviceError, match=r"finds no GPU \(CUDA_VISIBLE_DEVICES is '5'\)"):
        CudaDriver()


def test_with_a_driver_that_is_too_old(
    loading: Callable[[object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cuda.bindings.__version__", "13.5.0")
    loading(RecordedCalls(driver_version=12040))
    with pytest.raises(DeviceError, match=r"supports CUDA 12\.4, and cuda-bindings 13\.5\.0"):
        nvidia.load_bindings()


def test_other_failures_have_the_name_and_the_text_of_the_driver(
    loading: Callable[[object], None],
) -> None:
    calls = RecordedCalls()
    calls.results["cuInit"] = Code.CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
    loading(calls)
    with pytest.raises(DeviceError, match=r"SYSTEM_DRIVER_MISMATCH\) \(the driver was updated"):
        CudaDriver()


def test_too_little_memory_says_what_for() -> None:
    driver, calls = opened(free=1 << 20)
    calls.results["cuMemAlloc"] = Code.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(CapacityError, match=r"1\.0 MiB of memory free, and the weights take 5"):
        driver.allocate(5 << 20, "the weights")


def test_a_gpu_that_fails_is_named_as_such() -> None:
    driver, calls = opened()
    event = driver.record_event()
    calls.results["cuEventSynchronize"] = Code.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(DeviceError, match=r"the GPU failed \(a step failed\).*ILLEGAL_ADDRESS"):
        driver.wait(event)
    calls.results["cuStreamSynchronize"] = Code.CUDA_ERROR_ILLEGAL_ADDRESS
    driver.close()
    assert calls.contexts == 0


def test_a_driver_that_cannot_start_gives_everything_back() -> None:
    bindings, calls = recorded()
    calls.results["cuStreamCreate"] = Code.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(DeviceError, match="a stream"):
        CudaDriver(bindings=bindings)
    assert calls.contexts == 0


def test_free_memory_is_asked_for_with_a_context(loading: Callable[[object], None]) -> None:
    calls = RecordedCalls(free=123)
    loading(calls)
    assert nvidia.free_gpu_bytes() == 123
    assert calls.contexts == 0
    assert nvidia.find_gpu()[0].target == "sm_90"
    assert nvidia.describe_gpu().startswith("Test GPU (sm_90, 2.0 GiB), driver for CUDA 13.0, cuda")


def test_native_is_the_gpu_of_this_machine(
    loading: Callable[[object], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = TritonBackend()
    loading(RecordedCalls())
    assert backend.find_target("native").name == "sm_90"
    assert backend.unable_here() is None
    loading(RecordedCalls(count=0))
    with pytest.raises(TargetError, match=r"finds no GPU \(name the target, for example"):
        backend.find_target("native")
    assert backend.unable_here() == "the NVIDIA driver finds no GPU"


def test_each_call_exists_and_takes_as_many_arguments_as_it_is_given() -> None:
    """The bindings tell signatures in the first line of their documentation."""
    ours = {name: one for name, one in vars(RecordedCalls).items() if name.startswith("cu")}
    assert len(ours) > 35
    for name, function in ours.items():
        told = (getattr(real, name).__doc__ or "").strip().splitlines()[0]
        assert told.startswith(f"{name}("), name
        parameters = re.sub(r"\[[^\]]*\]", "", told[len(name) + 1 : told.rindex(")")])
        parameters = re.sub(r"\[[^\]]*\]", "", parameters)
        wanted = len([one for one in parameters.split(",") if one.strip()])
        own = list(inspect.signature(function).parameters.values())[1:]
        if not any(one.kind is one.VAR_POSITIONAL for one in own):
            assert len(own) == wanted, f"{told}: recorded with {len(own)}"
    used = set(re.findall(r"calls\.(cu[A-Z]\w+)", inspect.getsource(cuda)))
    used |= set(re.findall(r"calls\.(cu[A-Z]\w+)", inspect.getsource(nvidia)))
    assert len(used) > 25 and used <= ours.keys()
