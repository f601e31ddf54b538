"""The emulated driver: memory, copies, graphs, events, and faults that tests plant."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from infc.ir.errors import CapacityError, DeviceError
from infc.runtime.executors.gpu.driver import Driver, Function, MatrixMap

from .driver import DEVICE, EmulatedDriver, Options
from .running import written

Array = NDArray[Any]

ADD_ONE = written(
    """ld.param.b64 %rd1, [p0];
ld.param.b64 %rd2, [p1];
mov.u32 %r1, %tid.x;
mul.wide.u32 %rd3, %r1, 4;
add.s64 %rd1, %rd1, %rd3;
add.s64 %rd2, %rd2, %rd3;
ld.global.b32 %r2, [%rd1];
add.s32 %r2, %r2, 1;
st.global.b32 [%rd2], %r2;""",
    target="sm_90",
)
BYTES = 128


@pytest.fixture
def driver() -> EmulatedDriver:
    return EmulatedDriver()


def loaded(driver: EmulatedDriver) -> Function:
    return driver.load(b"", ADD_ONE.source, ADD_ONE.entry, ADD_ONE.threads, 0)


def packed(*addresses: int) -> bytes:
    return np.array(addresses, np.int64).tobytes()


def words(raw: Array) -> Array:
    return raw.view(np.int32)


def test_it_has_all_that_an_executor_needs(driver: EmulatedDriver) -> None:
    whole: Driver = driver  # a check of types, too
    assert whole.device == DEVICE


def test_work_is_carried_out_in_order_when_it_is_waited_for(driver: EmulatedDriver) -> None:
    function = loaded(driver)
    a, b = driver.allocate(BYTES, "a"), driver.allocate(BYTES, "b")
    source, target = driver.host_array(BYTES), driver.host_array(BYTES)
    words(source)[:] = np.arange(32)
    driver.upload(a, source)
    driver.launch(function, (1,), packed(a, b))
    driver.launch(function, (1,), packed(b, a))
    driver.download(target, a)
    event = driver.record_event()
    driver.fill(a, BYTES, 0)
    assert driver.launches == []
    assert driver.pending_uploads == 1
    assert (target == 0xFF).all(), "who reads early must not find what was there before"
    driver.wait(event)
    assert words(target).tolist() == list(range(2, 34))
    assert words(driver.contents(a, BYTES))[0] == 2, "what comes after the event has not been done"
    driver.synchronize()
    assert words(driver.contents(a, BYTES))[0] == 0
    assert [one.entry for one in driver.launches] == ["kernel", "kernel"]
    assert driver.num_uploaded_bytes == BYTES


def test_an_event_passes_only_after_it_was_asked_for_more_than_once(driver: EmulatedDriver) -> None:
    address, source = driver.allocate(BYTES, "a"), driver.host_array(BYTES)
    driver.upload(address, source)
    event = driver.record_event()
    assert not driver.has_passed(event)
    assert driver.has_passed(event)
    assert driver.has_passed(driver.record_event()) is True, "nothing is left to be done"


def test_a_source_that_is_used_again_too_early(driver: EmulatedDriver) -> None:
    address, source = driver.allocate(BYTES, "tokens"), driver.host_array(BYTES)
    driver.upload(address, source)
    source[7] = 1
    with pytest.raises(DeviceError, match="the source of an upload to byte 0 of 'tokens'"):
        driver.synchronize()
    assert len(driver.violations) == 1
    careless = EmulatedDriver(options=Options(checks_sources=False))
    address = careless.allocate(BYTES, "tokens")
    careless.upload(address, source)
    source[7] = 2
    careless.synchronize()
    assert careless.contents(address, BYTES)[7] == 2, "a copy may read as late as its event"


def test_graphs_keep_their_parameters(driver: EmulatedDriver) -> None:
    function = loaded(driver)
    a, b = driver.allocate(BYTES, "a"), driver.allocate(BYTES, "b")
    parameters = bytearray(packed(a, b))
    driver.begin_capture()
    driver.launch(function, (1,), parameters)  # type: ignore[arg-type]
    parameters[:] = packed(b, a)
    driver.launch(function, (1,), bytes(parameters))
    with pytest.raises(DeviceError, match="memory is allocated within a capture"):
        driver.allocate(BYTES, "c")
    with pytest.raises(DeviceError, match="a copy is asked for within a capture"):
        driver.upload(a, driver_free_array())
    graph = driver.end_capture()
    driver.fill(a, BYTES, 0)
    driver.synchronize()
    assert driver.launches == []
    for _ in range(3):
        driver.replay(graph)
    driver.synchronize()
    assert (words(driver.contents(a, BYTES)) == 6).all()
    assert [one.graph for one in driver.launches] == [0] * 6
    assert driver.num_replays == 3


def driver_free_array() -> Array:
    return np.zeros(BYTES, np.uint8)


def test_memory_is_limited_and_poisoned() -> None:
    driver = EmulatedDriver(replace(DEVICE, memory_bytes=10_000, free_bytes=10_000))
    first = driver.allocate(6_000, "weights")
    assert first % 256 == 0
    assert driver.device.free_bytes == 4_000
    with pytest.raises(CapacityError, match=r"KV takes 4001 bytes .* 4000 are free"):
        driver.allocate(4_001, "KV")
    driver.contents(first, 6_000)[:] = 0
    driver.free(first)
    second = driver.allocate(10_000, "KV")
    assert (driver.contents(second, 10_000) == 0xFF).all()
    with pytest.raises(DeviceError, match="no allocation begins there"):
        driver.free(first)
    with pytest.raises(DeviceError, match="an upload: out of bounds"):
        driver.upload(first, np.zeros(8, np.uint8))
    with pytest.raises(DeviceError, match="a download: out of bounds"):
        driver.download(np.zeros(10_001, np.uint8), second)
    assert len(driver.violations) == 3


def test_devices_may_have_more_memory_than_the_host() -> None:
    large = EmulatedDriver(replace(DEVICE, memory_bytes=141 << 30, free_bytes=140 << 30))
    large.allocate(1 << 16, "weights")
    assert large.device.free_bytes == (140 << 30) - (1 << 16)
    large.close()


def test_memory_that_is_used_after_it_was_given_back(driver: EmulatedDriver) -> None:
    function = loaded(driver)
    a, b = driver.allocate(BYTES, "a"), driver.allocate(BYTES, "b")
    driver.free(a)
    driver.launch(function, (1,), packed(a, b))
    with pytest.raises(DeviceError, match=r"body:6: ld\.global.*in no allocation"):
        driver.synchronize()
    with pytest.raises(DeviceError, match=r"body:6"):
        driver.allocate(BYTES, "c")  # after an error of a kernel nothing works any more


def test_freeing_waits_for_what_was_launched(driver: EmulatedDriver) -> None:
    function = loaded(driver)
    a, b = driver.allocate(BYTES, "a"), driver.allocate(BYTES, "b")
    driver.launch(function, (1,), packed(a, b))
    driver.free(a)
    driver.synchronize()
    assert len(driver.launches) == 1
    assert driver.violations == []


def test_kernels_that_do_not_fit_the_device(driver: EmulatedDriver) -> None:
    source = ADD_ONE.source
    with pytest.raises(DeviceError, match="no kernel 'other'"):
        driver.load(b"", source, "other", 32, 0)
    with pytest.raises(DeviceError, match="no kernel 'kernel'"):
        driver.load(b"machine code of another", source, "kernel", 32, 0)
    with pytest.raises(DeviceError, match="blocks of 32 threads, not 64"):
        driver.load(b"", source, "kernel", 64, 0)
    with pytest.raises(DeviceError, match="takes 232449 bytes of shared memory"):
        driver.load(b"", source, "kernel", 32, 232_449)
    for target, capability, fits in (
        ("sm_80", (8, 9), True),
        ("sm_89", (8, 0), False),
        ("sm_80", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100a", (10, 3), False),
    ):
        other = EmulatedDriver(replace(DEVICE, capability=capability))
        text = source.replace("sm_90", target)
        if fits:
            other.load(b"", text, "kernel", 32, 0)
        else:
            with pytest.raises(DeviceError, match=f"compiled for {target}"):
                other.load(b"", text, "kernel", 32, 0)


def test_launches_that_a_driver_refuses(driver: EmulatedDriver) -> None:
    function = loaded(driver)
    with pytest.raises(DeviceError, match="takes 16 bytes of parameters, not 8"):
        driver.launch(function, (1,), packed(1))
    for grid in ((0,), (1, 65536), (1, 1, -1)):
        with pytest.raises(DeviceError, match="a grid of"):
            driver.launch(function, grid, packed(1, 1))
    old = EmulatedDriver(replace(DEVICE, capability=(8, 0)))
    with pytest.raises(DeviceError, match="no programmatic dependent launch"):
        old.launch(function, (1,), packed(1, 1), dependent=True)
    with pytest.raises(DeviceError, match="no tensor memory accelerator"):
        old.descriptor(MatrixMap(1 << 20, "bf16", (8, 8), (8, 8), 0))


def test_descriptors_lie_in_memory(driver: EmulatedDriver) -> None:
    address = driver.allocate(64 * 128, "weights")
    good = MatrixMap(address, "bf16", (64, 64), (16, 64), 128)
    assert len(driver.descriptor(good)) == 128
    with pytest.raises(DeviceError, match="out of bounds: 8320 bytes"):
        driver.descriptor(replace(good, shape=(65, 64)))
    with pytest.raises(DeviceError, match="256 bytes side by side in a swizzle of 128"):
        driver.descriptor(replace(good, box=(16, 128)))


def test_faults_that_a_test_plants(driver: EmulatedDriver) -> None:
    function = loaded(driver)
    a, b = driver.allocate(BYTES, "a"), driver.allocate(BYTES, "b")
    driver.fill(a, BYTES, 0)
    driver.faults.allocations = 1
    driver.free(driver.allocate(BYTES, "c"))
    with pytest.raises(CapacityError, match="d takes 128 bytes"):
        driver.allocate(BYTES, "d")
    driver.faults.launch_calls = 1
    driver.launch(function, (1,), packed(a, b))
    with pytest.raises(DeviceError, match="the launch of kernel failed"):
        driver.launch(function, (1,), packed(a, b))
    driver.launch(function, (1,), packed(b, a))
    driver.synchronize()
    assert (words(driver.contents(a, BYTES)) == 2).all()
    driver.faults.running = 1
    for _ in range(3):
        driver.launch(function, (1,), packed(a, a))
    with pytest.raises(DeviceError, match="the device was lost in kernel"):
        driver.synchronize()
    assert len(driver.launches) == 4
    with pytest.raises(DeviceError, match="the device was lost"):
        driver.record_event()
    assert driver.violations == []


def test_nothing_works_once_it_is_closed(driver: EmulatedDriver) -> None:
    driver.allocate(BYTES, "a")
    driver.close()
    driver.close()
    assert driver.allocations() == ()
    with pytest.raises(DeviceError, match="after the device was closed"):
        driver.synchronize()
