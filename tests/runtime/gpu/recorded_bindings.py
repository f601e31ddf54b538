"""The functions of `cuda.bindings.driver` without a driver: they record calls, and run kernels.

Types and constants are the real ones, so that what is passed to them is checked as it would be.
Addresses are those of the host.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from cuda.bindings import driver as real
from numpy.typing import NDArray

from infc.ir.nvidia import Bindings
from infc.runtime.executors.gpu.cuda import ENCODE_TILED, MAP_BYTES, EncodeTiled

from .late_driver import KERNELS, unpacked

Result = tuple[Any, ...]
GOOD = real.CUresult.CUDA_SUCCESS


class HostMemory:
    """What kernels read and write: memory of the host at its own addresses."""

    def __init__(self) -> None:
        self.held: dict[int, NDArray[np.uint8]] = {}

    def add(self, num_bytes: int) -> int:
        array = np.full(num_bytes + 256, 0x7F, np.uint8)
        address = int(array.ctypes.data)
        self.held[address + -address % 256] = array
        return address + -address % 256

    def view(self, address: int, num_bytes: int) -> NDArray[np.uint8]:
        if num_bytes == 0:
            return np.zeros(0, np.uint8)
        return np.ctypeslib.as_array((ctypes.c_uint8 * num_bytes).from_address(address))

    def array(self, address: int, count: int, kind: Any = np.int32) -> NDArray[Any]:
        return self.view(address, count * np.dtype(kind).itemsize).view(kind)


class RecordedCalls:
    """Stands for the module `cuda.bindings.driver`.

    `results` gives a call another result than success, `driver_version` is what it reports.
    """

    def __init__(self, *, driver_version: int = 13000, count: int = 1, free: int = 1 << 30) -> None:
        self.calls: list[str] = []
        self.results: dict[str, real.CUresult] = {}
        self.memory = HostMemory()
        self.live: dict[str, list[int]] = {"device": [], "host": [], "event": [], "library": []}
        self.contexts = 0
        self._version, self._count, self._free = driver_version, count, free
        self._encode = EncodeTiled(self._encode_tiled)
        self._recorded: list[Callable[[], None]] | None = None
        self._next = 1

    def __getattr__(self, name: str) -> Any:
        """Enumerations and structures; a function that is not here is not to be called."""
        if name.startswith("cu") and not name.startswith("cuuint"):
            raise AssertionError(f"{name} is not expected")
        return getattr(real, name)

    def _done(self, name: str, *found: Any) -> Result:
        self.calls.append(name)
        return (self.results.get(name, GOOD), *found)

    def _handle(self, kind: Any) -> Any:
        self._next += 1
        return kind(self._next)

    # The driver and its devices

    def cuInit(self, flags: int) -> Result:
        return self._done("cuInit")

    def cuDriverGetVersion(self) -> Result:
        return self._done("cuDriverGetVersion", self._version)

    def cuGetErrorName(self, code: Any) -> Result:
        return GOOD, real.CUresult(code).name.encode()

    def cuGetErrorString(self, code: Any) -> Result:
        return GOOD, b"what the driver says of it"

    def cuDeviceGetCount(self) -> Result:
        return self._done("cuDeviceGetCount", self._count)

    def cuDeviceGet(self, index: int) -> Result:
        return self._done("cuDeviceGet", real.CUdevice(index))

    def cuDeviceGetName(self, length: int, device: Any) -> Result:
        return self._done("cuDeviceGetName", b"Test GPU".ljust(length, b"\0"))

    def cuDeviceTotalMem(self, device: Any) -> Result:
        return self._done("cuDeviceTotalMem", 1 << 31)

    def cuDeviceGetAttribute(self, which: Any, device: Any) -> Result:
        names = real.CUdevice_attribute
        known = {
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: 9,
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: 0,
            names.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: 232448,
            names.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: 132,
        }
        return self._done("cuDeviceGetAttribute", known[which])

    def cuDevicePrimaryCtxRetain(self, device: Any) -> Result:
        self.contexts += 1
        return self._done("cuDevicePrimaryCtxRetain", real.CUcontext(7))

    def cuDevicePrimaryCtxRelease(self, device: Any) -> Result:
        self.contexts -= 1
        return self._done("cuDevicePrimaryCtxRelease")

    def cuCtxSetCurrent(self, context: Any) -> Result:
        return self._done("cuCtxSetCurrent")

    def cuMemGetInfo(self) -> Result:
        return self._done("cuMemGetInfo", self._free, 1 << 31)

    # Streams, events, graphs

    def cuStreamCreate(self, flags: Any) -> Result:
        return self._done("cuStreamCreate", self._handle(real.CUstream))

    def cuStreamDestroy(self, stream: Any) -> Result:
        return self._done("cuStreamDestroy")

    def cuStreamSynchronize(self, stream: Any) -> Result:
        return self._done("cuStreamSynchronize")

    def cuEventCreate(self, flags: Any) -> Result:
        kinds = real.CUevent_flags
        assert flags in (kinds.CU_EVENT_DISABLE_TIMING, kinds.CU_EVENT_DEFAULT)
        event = self._handle(real.CUevent)
        self.live["event"].append(int(event))
        return self._done("cuEventCreate", event)

    def cuEventDestroy(self, event: Any) -> Result:
        self.live["event"].remove(int(event))
        return self._done("cuEventDestroy")

    def cuEventRecord(self, event: Any, stream: Any) -> Result:
        return self._done("cuEventRecord")

    def cuEventElapsedTime(self, first: Any, second: Any) -> Result:
        return self._done("cuEventElapsedTime", 0.25)

    def cuEventQuery(self, event: Any) -> Result:
        return self._done("cuEventQuery")

    def cuEventSynchronize(self, event: Any) -> Result:
        return self._done("cuEventSynchronize")

    def cuStreamBeginCapture(self, stream: Any, mode: Any) -> Result:
        assert mode == real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._recorded = []
        return self._done("cuStreamBeginCapture")

    def cuStreamEndCapture(self, stream: Any) -> Result:
        graph, self._recorded = self._recorded, None
        return self._done("cuStreamEndCapture", graph)

    def cuGraphInstantiate(self, graph: Any, flags: int) -> Result:
        return self._done("cuGraphInstantiate", list(graph))

    def cuGraphDestroy(self, graph: Any) -> Result:
        return self._done("cuGraphDestroy")

    def cuGraphExecDestroy(self, graph: Any) -> Result:
        return self._done("cuGraphExecDestroy")

    def cuGraphLaunch(self, graph: Any, stream: Any) -> Result:
        for run in graph:
            run()
        return self._done("cuGraphLaunch")

    # Memory

    def cuMemAlloc(self, num_bytes: int) -> Result:
        result = self._done("cuMemAlloc")
        if result[0] != GOOD:
            return (*result, real.CUdeviceptr(0))
        address = self.memory.add(num_bytes)
        self.live["device"].append(address)
        return (*result, real.CUdeviceptr(address))

    def cuMemFree(self, address: Any) -> Result:
        self.live["device"].remove(int(address))
        return self._done("cuMemFree")

    def cuMemHostAlloc(self, num_bytes: int, flags: int) -> Result:
        address = self.memory.add(num_bytes)
        self.live["host"].append(address)
        return self._done("cuMemHostAlloc", address)

    def cuMemFreeHost(self, address: int) -> Result:
        self.live["host"].remove(address)
        return self._done("cuMemFreeHost")

    def cuMemcpyHtoDAsync(self, target: Any, source: int, size: int, stream: Any) -> Result:
        assert self._recorded is None
        ctypes.memmove(int(target), source, size)
        return self._done("cuMemcpyHtoDAsync")

    def cuMemcpyDtoHAsync(self, target: int, source: Any, size: int, stream: Any) -> Result:
        assert self._recorded is None
        ctypes.memmove(target, int(source), size)
        return self._done("cuMemcpyDtoHAsync")

    def cuMemcpyDtoDAsync(self, target: Any, source: Any, size: int, stream: Any) -> Result:
        ctypes.memmove(int(target), int(source), size)
        return self._done("cuMemcpyDtoDAsync")

    def cuMemsetD8Async(self, address: Any, byte: int, size: int, stream: Any) -> Result:
        ctypes.memset(int(address), byte, size)
        return self._done("cuMemsetD8Async")

    # Kernels

    def cuLibraryLoadData(self, image: bytes, *options: Any) -> Result:
        assert options == ([], [], 0, [], [], 0)
        library = self._handle(real.CUlibrary)
        self.live["library"].append(int(library))
        return self._done("cuLibraryLoadData", library)

    def cuLibraryUnload(self, library: Any) -> Result:
        self.live["library"].remove(int(library))
        return self._done("cuLibraryUnload")

    def cuLibraryGetKernel(self, library: Any, name: bytes) -> Result:
        return self._done("cuLibraryGetKernel", name.decode())

    def cuKernelGetFunction(self, kernel: Any) -> Result:
        return self._done("cuKernelGetFunction", kernel)

    def cuFuncLoad(self, function: Any) -> Result:
        return self._done("cuFuncLoad")

    def cuFuncSetAttribute(self, function: Any, name: Any, value: int) -> Result:
        names = real.CUfunction_attribute
        assert name == names.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        return self._done(f"cuFuncSetAttribute {value}")

    def cuLaunchKernel(
        self, function: str, x: int, y: int, z: int, bx: int, by: int, bz: int, shared: int,
        stream: Any, parameters: int, extra: int,
    ) -> Result:  # fmt: skip
        assert (by, bz, parameters) == (1, 1, 0)
        return self._launched("cuLaunchKernel", function, (x, y, z), extra)

    def cuLaunchKernelEx(self, config: Any, function: str, parameters: int, extra: int) -> Result:
        (attribute,) = config.attrs
        names = real.CUlaunchAttributeID
        assert attribute.id == names.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        assert attribute.value.programmaticStreamSerializationAllowed == 1 == config.numAttrs
        grid = (config.gridDimX, config.gridDimY, config.gridDimZ)
        assert (config.blockDimY, config.blockDimZ, parameters) == (1, 1, 0)
        return self._launched("cuLaunchKernelEx", function, grid, extra)

    def _launched(self, call: str, function: str, grid: tuple[int, ...], extra: int) -> Result:
        words = (ctypes.c_void_p * 5).from_address(extra)
        assert (words[0], words[2], words[4]) == (1, 2, None)
        assert words[1] is not None and words[3] is not None
        size = ctypes.c_size_t.from_address(words[3]).value
        parameters = ctypes.string_at(words[1], size)
        signature, body = KERNELS[function]
        arguments = unpacked(signature, parameters)

        def run() -> None:
            body(self.memory, grid, *arguments)

        if self._recorded is not None:
            self._recorded.append(run)
        else:
            run()
        return self._done(call)

    def cuGetProcAddress(self, symbol: bytes, version: int, flags: int) -> Result:
        assert symbol == ENCODE_TILED and version >= 12000
        address = ctypes.cast(self._encode, ctypes.c_void_p).value
        found = real.CUdriverProcAddressQueryResult.CU_GET_PROC_ADDRESS_SUCCESS
        return self._done("cuGetProcAddress", address, found)

    def _encode_tiled(self, room: int, kind: int, rank: int, address: int, *rest: Any) -> int:
        """As strict as a driver may be about the place of a descriptor."""
        sizes, strides, box, steps, _, swizzle, _, _ = rest
        if room % MAP_BYTES:
            return int(real.CUresult.CUDA_ERROR_INVALID_VALUE)
        assert list(steps[:rank]) == [1] * rank
        told = [sizes[:rank], strides[: rank - 1], box[:rank]]
        names = real.CUtensorMapDataType(kind).name, real.CUtensorMapSwizzle(swizzle).name
        self.calls.append(f"{names[0]} at {address}: {told} {names[1]}")
        ctypes.memset(room, len(self.calls) % 256, MAP_BYTES)
        return int(self.results.get("cuTensorMapEncodeTiled", GOOD))


def recorded(**options: Any) -> tuple[Bindings, RecordedCalls]:
    """Bindings whose calls are recorded."""
    calls = RecordedCalls(**options)
    return Bindings(calls, "13.0.0", (13, 0)), calls
